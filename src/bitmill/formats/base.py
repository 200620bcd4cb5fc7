"""What a format is to storage and to the runtime: named tensors of known shapes that decode to a matrix.

    codes    (rows, stored codes a row)   unsigned integers
    params   name -> fp32 working values, already rounded as stored

Laws, tested for every registered format (tests/conformance/test_formats.py):

    unpack(pack(codes, params)) == (codes, params)
    packed bytes * 8 == stored_bits(shape)         honest bits
    repr and dict round-trip

`grouped` adds the verbs that solvers use, `wrapper` formats around other formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bitmill.config.registry import Member, Registry
from bitmill.numerics.packing import pack, unpack, unpack_at, words_for

if TYPE_CHECKING:
    from bitmill.formats.grouped import GroupFormat

Params = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype) of tensors on disk

_LONG = 1 << 12  # columns of a row whose ragged end counts for nothing

FORMATS: Registry[type[Format]] = Registry("format", "bitmill.formats")


@dataclass(frozen=True)
class Part:
    """How one parameter array is stored: numbers of `dtype`, or unsigned integers of `bits` bits."""

    name: str
    shape: tuple[int, ...]
    bits: int | None = None
    stored_as: torch.dtype = torch.float16  # without `bits`

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape on disk. Integers are packed along the rows, which leaves no holes in short group axes."""
        if self.bits is None:
            return self.shape
        return (words_for(self.shape[0], self.bits), *self.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Type on disk."""
        return self.stored_as if self.bits is None else torch.int32

    def pack(self, values: Tensor) -> Tensor:
        """Working values as they are stored."""
        if self.bits is None:
            return values.to(self.stored_as).contiguous()
        return pack(values.movedim(0, -1), self.bits).movedim(-1, 0).contiguous()

    def unpack(self, stored: Tensor) -> Tensor:
        """Inverse of `pack`, fp32; arrays of integers keep their type."""
        if self.bits is not None:
            stored = unpack(stored.movedim(0, -1), self.bits, self.shape[0]).movedim(-1, 0)
            return stored.to(torch.float32)
        return stored.to(torch.float32) if stored.is_floating_point() else stored

    def unpack_rows(self, stored: Tensor, rows: Tensor) -> Tensor:
        """What `unpack` gives for some rows, int64 (n,), at their cost alone; all of it where rows share it."""
        if self.shape[0] == 1:
            return self.unpack(stored)
        if self.bits is not None:
            return unpack_at(stored.movedim(0, -1), self.bits, rows).movedim(-1, 0).to(torch.float32)
        return stored[rows].to(torch.float32) if stored.is_floating_point() else stored[rows]


@dataclass(frozen=True)
class Format(Member, ABC):
    """Base of all formats: a frozen dataclass whose fields are exactly what a reader needs to decode."""

    registry: ClassVar[Registry[type[Format]]] = FORMATS

    @property
    def stackable(self) -> bool:
        """Whether layers that read one input may be solved as one tall matrix."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that solving it uses besides the solver's own, see `solvers.base`."""
        return frozenset()

    @property
    def shared(self) -> frozenset[str]:
        """Names of the parts that all layers of a kind share: learned before the first block, stored once."""
        return frozenset()

    @property
    @abstractmethod
    def core(self) -> GroupFormat:
        """What a solver works with: the format itself, or the one that wrappers wrap."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one stored code, 1 to 16."""

    @property
    def rate(self) -> float:
        """Bits of the codes for one weight of a long row: what users mean by the bits of a format."""
        return self.codes_in(_LONG) * self.code_bits / _LONG

    @abstractmethod
    def codes_in(self, columns: int) -> int:
        """Codes that store a row of `columns` weights."""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """The stored parameter arrays of a matrix of `shape` (rows, columns), codes not included."""

    @abstractmethod
    def dequantize(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """The stored matrix, fp32 of `shape`."""

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Every tensor that decoding takes."""
        tensors = {p.name: (p.packed_shape, p.dtype) for p in self.parts(shape)}
        return {"codes": ((shape[0], words_for(self.codes_in(shape[1]), self.code_bits)), torch.int32), **tensors}

    def own_layout(self, shape: tuple[int, int]) -> Layout:
        """Those that a layer does not share."""
        return {name: entry for name, entry in self.layout(shape).items() if name not in self.shared}

    def shared_layout(self) -> Layout:
        """Those that it shares, whose size no matrix has a say in."""
        return {name: entry for name, entry in self.layout((1, 1)).items() if name in self.shared}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits on disk of a single matrix of `shape`, everything included."""
        return _bits(self.layout(shape))

    def own_bits(self, shape: tuple[int, int]) -> int:
        """Bits on disk of a layer that shares what it can."""
        return _bits(self.own_layout(shape))

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> dict[str, Tensor]:
        """codes and params as the tensors that `layout` names."""
        return {
            "codes": pack(codes, self.code_bits),
            **{part.name: part.pack(params[part.name]) for part in self.parts(shape)},
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        """Inverse of `pack`: codes and fp32 params."""
        return self.unpack_codes(tensors["codes"], shape[1]), self.unpack_params(tensors, shape)

    def unpack_codes(self, stored: Tensor, columns: int) -> Tensor:
        """The codes of some rows alone, uint8 up to 8 bits, int32 above."""
        return unpack(stored, self.code_bits, self.codes_in(columns))

    def unpack_params(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Params:
        """The params alone, fp32."""
        return {part.name: part.unpack(tensors[part.name]) for part in self.parts(shape)}

    def pack_shared(self, params: Params) -> dict[str, Tensor]:
        """The shared parts as the tensors that `shared_layout` names."""
        return {part.name: part.pack(params[part.name]) for part in self.parts((1, 1)) if part.name in self.shared}

    def unpack_shared(self, tensors: dict[str, Tensor]) -> Params:
        """Inverse of `pack_shared`."""
        parts = (part for part in self.parts((1, 1)) if part.name in self.shared)
        return {part.name: part.unpack(tensors[part.name]) for part in parts}


def total_stored_bits(layers: Iterable[tuple[Format, tuple[int, int], Hashable]]) -> int:
    """Bits on disk of layers, everything included: format, shape, and by what the sharing know each other."""
    total, shared = 0, dict[Hashable, int]()
    for format, shape, place in layers:
        total += format.own_bits(shape)
        shared[place] = _bits(format.shared_layout()) if format.shared else 0
    return total + sum(shared.values())


def _bits(layout: Layout) -> int:
    return sum(torch.Size(size).numel() * dtype.itemsize * 8 for size, dtype in layout.values())
