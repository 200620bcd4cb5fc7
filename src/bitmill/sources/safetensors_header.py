"""The header of a safetensors file, checked against the file before any library maps it.

Layout: u64 header length (little endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, then
the data, which the tensors cover without gap or overlap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitmill.errors import SourceError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; begin and end in bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, by name. Raises SourceError for whatever does not add up."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _bad(path, f"its header claims {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _bad(path, "its header is no valid JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    _check_cover(path, entries, size - 8 - length)
    return entries


def _entry(path: Path, name: str, fields: Any) -> TensorEntry:
    if not isinstance(fields, dict):
        raise _bad(path, f"the tensor {name!r} has no description")
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, f"the tensor {name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise _bad(path, f"the tensor {name!r} has the shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _bad(path, f"the tensor {name!r} has the offsets {offsets!r}")
    needed = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise _bad(
            path, f"the tensor {name!r} spans bytes {offsets[0]} to {offsets[1]} and its shape needs {needed}"
        )
    return TensorEntry(DTYPES[dtype], tuple(shape), *offsets)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, entries: dict[str, TensorEntry], data_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data_bytes:
            raise _bad(path, f"the tensor {name!r} ends at byte {entry.end} of {data_bytes}; it is truncated")
        if entry.begin != end:
            what = "overlaps the one before it" if entry.begin < end else "leaves a gap before it"
            raise _bad(path, f"the tensor {name!r} at byte {entry.begin} {what}")
        end = entry.end
    if end != data_bytes:
        raise _bad(path, f"its tensors end at byte {end} of {data_bytes}")


def _bad(path: Path, clause: str) -> SourceError:
    return SourceError(f"{path} is not a sound safetensors file ({clause}); fetch it again.")
