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

from bitmill.formats.base import FORMATS
from bitmill.formats.vector import VectorFormat
from bitmill.numerics.pyramid import count, has_number_beyond, most_pulses, number, point, project

# Lloyd-Max levels of the norm of 16 standard normal numbers.
LENGTHS = (
    2.255, 2.645, 2.923, 3.153, 3.358, 3.549, 3.731, 3.910,
    4.090, 4.275, 4.469, 4.677, 4.910, 5.183, 5.527, 6.044,
)  # fmt: skip
_DIGIT = 4
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
        pieces = [self._encode(piece) for piece in x.split(_SLICE)]
        return torch.cat(pieces) if pieces else x.new_zeros(0, self.codes_per_block, dtype=torch.uint8)

    def points(self, codes: Tensor) -> Tensor:
        """Return length * y / |y|."""
        pieces = [self._points(piece) for piece in codes.split(_SLICE)]
        return torch.cat(pieces) if pieces else torch.zeros(0, self.block, device=codes.device)

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return that a number is of no point: `points` gives some vector there, and compiled code another."""
        points = -(-shape[1] // self.block)
        if has_number_beyond(tensors["codes"], points, self.bits, count(self.block, self.pulses)):
            return "its codes hold numbers of no point"
        return super().damage_reason(tensors, shape)

    def _encode(self, x: Tensor) -> Tensor:
        y = project(x, self.pulses)
        digits = number(y, self.pulses)[:, None] >> self._shifts(x.device) & ((1 << _DIGIT) - 1)
        projection = (x * _unit(y)).sum(1)
        lengths = _lengths(x.device)
        gain = torch.bucketize(projection, (lengths[1:] + lengths[:-1]) / 2)
        return torch.cat([digits, gain[:, None]], 1).to(torch.uint8)

    def _points(self, codes: Tensor) -> Tensor:
        numbers = (codes[:, :-1].long() << self._shifts(codes.device)).sum(1)
        unit = _unit(point(numbers, self.block, self.pulses))
        return unit * _lengths(codes.device)[codes[:, -1].long()][:, None]

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.arange(0, self.block * self.bits, _DIGIT, device=device)


def _unit(y: Tensor) -> Tensor:
    # a root taken in fp64 rounds to the same fp32 everywhere; those in fp32 are off by a bit on some machines
    return y / y.square().sum(1, keepdim=True).to(torch.float64).sqrt().to(torch.float32)


@lru_cache(maxsize=8)
def _lengths(device: torch.device) -> Tensor:
    return torch.tensor(LENGTHS, device=device)
