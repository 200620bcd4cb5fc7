"""Pyramid vector quantization: the direction of sixteen weights as a numbered integer point, and its length.

    number  16 * bits bits: one of the integer vectors y with sum |y_i| = K, see `numerics.pyramid`;
            K is the largest whose vectors can all be numbered: 4, 12, 27, 58 for 1, 2, 3, 4 bits
    gain    4 bits, an index into sixteen lengths
    scale   fp16, the RMS of a row

    w^ = scale * length * y / |y|

stored as 4-bit codes, the number first, lowest digit first. There is no codebook: the lengths are those of
least squared error for sixteen Gaussian numbers of variance 1 (chi with 16 degrees of freedom, the limit of the
Beta law of a part of a row as the row gets long). Made for weights in a rotated basis. Bits a
weight: bits + 1/4 + 16/columns.

Source: PVQ for LLMs (arXiv 2410.16926); Fischer 1986, "A pyramid vector quantizer". Block width, bits of the
gain and the numbering are this module's own: of the paper only the outline is public.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from bitmill import native
from bitmill.formats.base import FORMATS
from bitmill.formats.vector import VectorFormat
from bitmill.numerics.packing import pack
from bitmill.numerics.pyramid import count, halved_sum, has_number_beyond, most_pulses, number, point, project

# Lloyd-Max levels of the norm of 16 standard normal numbers.
LENGTHS = (
    2.255, 2.645, 2.923, 3.153, 3.358, 3.549, 3.731, 3.910,
    4.090, 4.275, 4.469, 4.677, 4.910, 5.183, 5.527, 6.044,
)  # fmt: skip
_DIGIT = 4
_SET = 1  # of the compiled vector sets
_SLICE = 1 << 14  # vectors at a time, so that temporaries stay in the cache


@FORMATS.register("pyramid")
@dataclass(frozen=True)
class Pyramid(VectorFormat):
    """Direction on a pyramid of integers, and length; `bits` 1 to 4 for the direction."""

    block: ClassVar[int] = 16
    max_bits: ClassVar[int] = 4
    rms: ClassVar[float] = 1.0

    @property
    def pulses(self) -> int:
        """K, the L1 norm of the integer vectors."""
        return most_pulses(self.block, self.block * self.bits)

    @property
    def code_bits(self) -> int:
        """Bits of a code, a hexadecimal digit."""
        return _DIGIT

    @property
    def codes_per_block(self) -> int:
        """The digits of the number, and the gain."""
        return self.block * self.bits // _DIGIT + 1

    def encode(self, x: Tensor) -> Tensor:
        """Find the direction of (nearly) largest cosine, then the length nearest to the projection on it."""
        return self.snap(x)[0]

    def snap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and vectors: numbering a point and finding it again costs as much as the search."""
        if _is_compiled(x):
            codes = x.new_empty(len(x), self.codes_per_block, dtype=torch.uint8)
            vectors = torch.empty_like(x, memory_format=torch.contiguous_format)
            lengths = _lengths(x.device)
            native.native().nearest_points(self.bits, lengths, x.contiguous(), codes, vectors, native.threads())
            return codes, vectors
        return self._snap_in_torch(x)

    def _snap_in_torch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_zeros(0, self.codes_per_block, dtype=torch.uint8), x
        pieces = [self._snap_slice(piece) for piece in x.split(_SLICE)]
        return torch.cat([codes for codes, _ in pieces]), torch.cat([vectors for _, vectors in pieces])

    def points(self, codes: Tensor) -> Tensor:
        """Return length * y / |y|."""
        if _is_compiled(codes):
            out = torch.empty(len(codes), self.block)
            words, ones = pack(codes, _DIGIT), torch.ones(1, 1)
            lengths = _lengths(codes.device)
            native.native().vector_decode(
                _SET, self.block, self.bits, words, ones, lengths, 0, out, native.threads()
            )
            return out
        return self._points_in_torch(codes)

    def _points_in_torch(self, codes: Tensor) -> Tensor:
        pieces = [self._points(piece) for piece in codes.split(_SLICE)]
        return torch.cat(pieces) if pieces else torch.zeros(0, self.block, device=codes.device)

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return that a number is of no point: `points` gives some vector there, and compiled code another."""
        points = -(-shape[1] // self.block)
        if has_number_beyond(tensors["codes"], points, self.bits, count(self.block, self.pulses)):
            return "its codes hold numbers of no point"
        return super().damage_reason(tensors, shape)

    def _snap_slice(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = project(x, self.pulses)
        digits = number(y, self.pulses)[:, None] >> self._shifts(x.device) & ((1 << _DIGIT) - 1)
        unit, lengths = _unit(y), _lengths(x.device)
        gain = torch.bucketize(halved_sum(x * unit)[:, 0], (lengths[1:] + lengths[:-1]) / 2)
        return torch.cat([digits, gain[:, None]], 1).to(torch.uint8), unit * lengths[gain][:, None]

    def _points(self, codes: Tensor) -> Tensor:
        numbers = (codes[:, :-1].long() << self._shifts(codes.device)).sum(1)
        unit = _unit(point(numbers, self.block, self.pulses))
        return unit * _lengths(codes.device)[codes[:, -1].long()][:, None]

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.arange(0, self.block * self.bits, _DIGIT, device=device)


def _is_compiled(x: Tensor) -> bool:
    return len(x) > 0 and x.device.type == "cpu" and native.unsupported_reason("nearest_points") is None


def _unit(y: Tensor) -> Tensor:
    # a root taken in fp64 rounds to the same fp32 everywhere; those in fp32 are off by a bit on some machines
    return y / y.square().sum(1, keepdim=True).to(torch.float64).sqrt().to(torch.float32)


@lru_cache(maxsize=8)
def _lengths(device: torch.device) -> Tensor:
    return torch.tensor(LENGTHS, device=device)
