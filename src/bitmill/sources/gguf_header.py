"""The header of a GGUF file. Every length is checked against the size of the file before it is used.

Layout (little endian): magic "GGUF", u32 version, u64 tensors, u64 pairs; the key/value pairs; per tensor
its name, u32 dims, the dims (fastest first), u32 type, u64 offset; padding to `general.alignment`; data.
Data is not read, and only the length of string arrays (vocabularies) is kept.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from bitmill.errors import SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NAME_BYTES = 65535

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SMALLEST_PAIR_BYTES = 8 + 4 + 1
_SMALLEST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    shape: in torch order, (rows, columns).
    kind: GGML type of the codes.
    offset: bytes from the start of the file.
    size_bytes: bytes of the codes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    metadata: key -> value; an array of strings is replaced by its length.
    tensors: name -> tensor.
    metadata_bytes: bytes from the start of the file to the end of the metadata.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    metadata_bytes: int


def read_header(path: Path) -> Header:
    """Parse and check the header of a file. Raises SourceError for a damaged one."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise _InvalidFile("it is shorter than a GGUF header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(data).parse()
    except _InvalidFile as error:
        raise SourceError(f"{path} is not a valid GGUF file: {error}; fetch it again.") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}).") from error


class _InvalidFile(Exception):
    """A defect of the file; the message is a clause."""


class _Parser:
    """Reads values from a mapped file and moves forward."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0

    def parse(self) -> Header:
        """Return the header. Raises _InvalidFile."""
        magic = self.data[:4]
        if magic != MAGIC:
            raise _InvalidFile(f"it starts with {bytes(magic)!r} instead of {MAGIC!r}")
        self.at = 4
        version = self.scalar("I")
        if version not in VERSIONS:
            raise _InvalidFile(f"its version is {version}, and only 2 and 3 are supported")
        n_tensors, n_pairs = self.scalar("Q"), self.scalar("Q")
        self.fits(n_pairs, _SMALLEST_PAIR_BYTES, "key/value pairs")
        self.fits(n_tensors, _SMALLEST_TENSOR_BYTES, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = self.string("a key", MAX_NAME_BYTES)
            if key in metadata:
                raise _InvalidFile(f"the key {key!r} appears twice")
            metadata[key] = self.value(self.scalar("I"), key)
        metadata_bytes = self.at
        entries = [self.tensor_entry() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _InvalidFile(f"general.alignment is {alignment!r}, which is no power of two")
        start = -(-self.at // alignment) * alignment
        return Header(metadata, self.place(entries, start), metadata_bytes)

    def scalar(self, code: str) -> Any:
        """Read one number; `code` is that of the struct module."""
        width = struct.calcsize("<" + code)
        if self.at + width > self.size:
            raise _InvalidFile(f"its header runs past the end of the file at byte {self.size}")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += width
        return value

    def fits(self, count: int, width: int, what: str) -> None:
        """Check that announced items fit into the rest of the file.

        Args:
            count: number of items.
            width: least bytes of an item.
            what: the items, for the message.

        Raises:
            _InvalidFile: They do not fit.
        """
        if count * width > self.size - self.at:
            raise _InvalidFile(f"it announces {count} {what}, more than its {self.size} bytes can hold")

    def string(self, what: str, limit: int | None = None) -> str:
        """Read a string with its length.

        Args:
            what: the string, for the message.
            limit: most bytes.

        Raises:
            _InvalidFile: It is too long or no UTF-8.
        """
        length = self.scalar("Q")
        self.fits(length, 1, f"bytes for {what}")
        if limit is not None and length > limit:
            raise _InvalidFile(f"{what} is {length} bytes long")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _InvalidFile(f"{what} is not valid UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """Read the value of a key.

        Args:
            kind: type of the value.
            key: the key, for the message.

        Returns:
            A number, a bool, a string, a list of numbers, or the length of an array of strings.

        Raises:
            _InvalidFile: The type is unknown.
        """
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind != _ARRAY:
            raise _InvalidFile(f"the key {key!r} has the unknown value type {kind}")
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            code = f"{count}{_SCALARS[element]}"
            self.fits(count, struct.calcsize("<" + _SCALARS[element]), f"elements for {key!r}")
            values = list(struct.unpack_from("<" + code, self.data, self.at))
            self.at += struct.calcsize("<" + code)
            return values
        if element != _STRING:
            raise _InvalidFile(f"the array {key!r} has the unknown element type {element}")
        self.fits(count, 8, f"strings for {key!r}")
        for _ in range(count):
            length = self.scalar("Q")
            self.fits(length, 1, f"bytes for a string of {key!r}")
            self.at += length
        return count

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, type and offset of one tensor."""
        name = self.string("a tensor name", MAX_NAME_BYTES)
        n_dims = self.scalar("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise _InvalidFile(f"the tensor {name!r} has {n_dims} dimensions")
        dims = [self.scalar("Q") for _ in range(n_dims)]
        return name, tuple(reversed(dims)), self.scalar("I"), self.scalar("Q")

    def place(self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, GgufTensor]:
        """Return the tensors by name, with checked types, shapes and offsets.

        Args:
            entries: name, shape, type and offset of every tensor.
            start: first byte of the data.

        Raises:
            _InvalidFile: A tensor has an impossible shape, overlaps another one, or leaves the file.
        """
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise _InvalidFile(f"the tensor {name!r} appears twice")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise _InvalidFile(f"the tensor {name!r} has the unknown type {number}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if prod(shape) == 0 or shape[-1] % block:
                raise _InvalidFile(f"the {kind.name} tensor {name!r} cannot have the shape {shape}")
            tensor = GgufTensor(shape, kind, start + offset, prod(shape) // block * block_bytes)
            if tensor.offset + tensor.size_bytes > self.size:
                raise _InvalidFile(
                    f"the tensor {name!r} ends at byte {tensor.offset + tensor.size_bytes} "
                    f"of a file of {self.size} bytes"
                )
            tensors[name] = tensor
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise _InvalidFile(f"the tensors {before!r} and {name!r} overlap")
            end, before = tensor.offset + tensor.size_bytes, name
        return tensors
