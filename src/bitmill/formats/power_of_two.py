"""Powers of 2 or of its square root, and 0: W^ = scale * level(code).

    code   sign (highest bit) and magnitude m, bits - 1 bits; code 0 stores 0, every other code
           +-base^(m - (2^(bits - 1) - 1)): all 2^bits codes are different numbers, down from base^0 = 1
    base   2 (power_of_two) or sqrt(2) (post)
    scale  fp16, one a group

The smallest negative power has no positive twin, whose code is that of 0. A decoder of power_of_two shifts
right by 2^(bits - 1) - 1 - m places. One of post shifts by half as many, after a product with 1/sqrt(2) where
that is odd, or looks the code up. More bits add small numbers alone: between 1/2 and 1 there is no power of 2.
Bits a weight: bits + 16/group_size.

Sources: Przewlocka-Rus et al. 2022, "Power-of-Two Quantization for Low Bitwidth and Hardware Compliant Neural
Networks" (arXiv 2203.05025), for powers of 2, where the scale of a layer is a power of 2 as well; "ASQ + POST"
(arXiv 2504.17263) for those of sqrt(2). The released POST has 2^bits + 1 levels, one more than there are codes,
and they are powers of 2: the square root is commented out. Here are the powers of the paper. Its scales start
at the 99th percentile of the magnitudes, here at the largest. Codes are those of the nearest level; the solver
`nearest` rounds the logarithm with distance=log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS
from bitmill.formats.scaled import FloatScaled
from bitmill.numerics.table import Table


@dataclass(frozen=True)
class Powers(FloatScaled):
    """Base of the formats of signed powers."""

    roots: ClassVar[int]  # the base is 2^(1 / roots)
    shares: ClassVar[tuple[float, ...]] = tuple(1 + k / 20 for k in range(-13, 9) if k)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise RecipeError(
                f"{self.name} has a sign and a power, so 2 to {self.max_bits} bits, not {self.bits!r}."
            )

    @property
    def largest(self) -> float:
        """1."""
        return 1.0

    def shifts(self) -> list[int]:
        """Return by how many powers the number of each code is smaller than 1; that of code 0, which is 0, too."""
        half = 1 << (self.bits - 1)
        return 2 * list(range(half - 1, -1, -1))

    def table(self, device: torch.device) -> Table:
        """Return the number of every code."""
        half = 1 << (self.bits - 1)
        powers = [2.0 ** (-shift / self.roots) for shift in self.shifts()]
        return Table(torch.tensor([0.0, *powers[1:half], *(-power for power in powers[half:])], device=device))


@FORMATS.register("power_of_two")
@dataclass(frozen=True)
class PowerOfTwo(Powers):
    """Powers of 2, which a decoder shifts; `bits` 2 to 6."""

    roots: ClassVar[int] = 1
    max_bits: ClassVar[int] = 6


@FORMATS.register("post")
@dataclass(frozen=True)
class PowerOfSqrtTwo(Powers):
    """Powers of the square root of 2; `bits` 2 to 7."""

    roots: ClassVar[int] = 2
    max_bits: ClassVar[int] = 7
