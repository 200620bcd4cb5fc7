"""Additive powers of two: sums of powers of 2 as levels, W^ = +-scale * sum(code).

    code   sign (highest bit) and magnitude, bits - 1 bits; -0 is never stored
    scale  fp16, one a group

Every two bits of a magnitude choose one of 0 and three powers of 2, one bit 0 or one power; all powers are
different, so that 2^(bits - 1) sums are. A multiplication by such a level is a shift and an addition for each
term:

    bits   terms, each 0 or one of                                          largest sum
    3      2^-1 2^-2 2^-3                                                   1/2
    4      2^-1 2^-2 2^-4;  2^-3                                            5/8
    5      2^-1 2^-3 2^-5;  2^-2 2^-4 2^-6                                  3/4
    6      2^-1 2^-3 2^-6;  2^-2 2^-4 2^-7;  2^-5                           25/32
    7      2^-1 2^-4 2^-7;  2^-2 2^-5 2^-8;  2^-3 2^-6 2^-9                 7/8

Magnitudes are numbered by their size. Bits a weight: bits + 16/group_size.

Source: Li et al. 2020, "Additive Powers-of-Two Quantization" (arXiv 1909.13144), section 2.2 and the level sets
of the authors' code. There weights are standardized and the scale is a learned threshold; here it is fitted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS
from bitmill.formats.scaled import FloatScaled
from bitmill.numerics.table import Table

# by bits: the exponents of every term, see above
_TERMS = {
    3: ((1, 2, 3),),
    4: ((1, 2, 4), (3,)),
    5: ((1, 3, 5), (2, 4, 6)),
    6: ((1, 3, 6), (2, 4, 7), (5,)),
    7: ((1, 4, 7), (2, 5, 8), (3, 6, 9)),
}


@FORMATS.register("apot")
@dataclass(frozen=True)
class AdditivePowersOfTwo(FloatScaled):
    """Sums of one to three powers of 2; `bits` 3 to 7."""

    max_bits: ClassVar[int] = 7
    shares: ClassVar[tuple[float, ...]] = tuple(1 + k / 20 for k in range(-13, 9) if k)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in _TERMS:
            raise RecipeError(
                f"apot has sums of powers for 3 to 7 bits, not {self.bits!r}; choose bits in that range."
            )

    def sums(self) -> list[float]:
        """Return the sums of all choices of terms, rising from 0."""
        choices = itertools.product(*((0.0, *(2.0**-e for e in exponents)) for exponents in _TERMS[self.bits]))
        return sorted(map(sum, choices))

    @property
    def largest(self) -> float:
        """Largest sum."""
        return self.sums()[-1]

    def table(self, device: torch.device) -> Table:
        """Return the number of every code."""
        sums = self.sums()
        return Table(torch.tensor([*sums, *(-value for value in sums)], device=device))
