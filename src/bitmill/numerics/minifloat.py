"""Floating-point numbers of 4 to 8 bits: the values of their codes.

A code is, from the highest bit down, a sign, an exponent field e and a mantissa field m of M bits:

    e > 0    (-1)^sign * 2^(e - bias) * (1 + m / 2^M)
    e = 0    (-1)^sign * 2^(1 - bias) * m / 2^M

Codes that the standards reserve for NaN and infinities decode to the largest number of their sign, so that every
code has a value; rounding never chooses them, nor -0.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0, tables 1 and 2, for e4m3 and e5m2; OCP
Microscaling Formats (MX) Specification 1.0, section 5.3, for e3m2, e2m3 and e2m1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bitmill.numerics.table import Table

ElementName = Literal["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]


@dataclass(frozen=True)
class Element:
    """An element type: widths of its fields, exponent bias, largest finite number, its floor(log2)."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    largest_exponent: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    def value(self, code: int) -> float:
        """Return the value of a code."""
        exponent = code >> self.mantissa_bits & ((1 << self.exponent_bits) - 1)
        fraction = (code & ((1 << self.mantissa_bits) - 1)) / (1 << self.mantissa_bits)
        size = 2.0 ** (max(exponent, 1) - self.bias) * (fraction + (exponent > 0))
        return (-1.0 if code >> (self.bits - 1) else 1.0) * min(size, self.largest)

    def values(self) -> Tensor:
        """Return the value of every code, (2**bits,) fp32."""
        return torch.tensor([self.value(code) for code in range(1 << self.bits)])


ELEMENTS: dict[str, Element] = {
    "e4m3": Element(4, 3, 7, 448.0, 8),
    "e5m2": Element(5, 2, 15, 57344.0, 15),
    "e3m2": Element(3, 2, 3, 28.0, 4),
    "e2m3": Element(2, 3, 1, 7.5, 2),
    "e2m1": Element(2, 1, 1, 6.0, 2),
}
assert set(ELEMENTS) == set(get_args(ElementName))

_EXPONENT = 0x7F800000  # the exponent field of fp32


class ElementTable(Table):
    """The values of an element type; its codes are found by arithmetic instead of search."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(ELEMENTS[name].values().to(device))
        self.element = ELEMENTS[name]

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of the values nearest to x, uint8, any shape; ties to even, saturated at the ends."""
        kind = self.element
        steps, octave = self._steps(x)
        field = (octave.view(torch.int32) >> 23).add_(kind.bias - 128).bitwise_left_shift_(kind.mantissa_bits)
        # a mantissa that was rounded up to the next octave carries into the exponent by itself
        magnitude = field.add_(steps.abs().to(torch.int32))
        return magnitude.add_((steps < 0).to(torch.int32), alpha=1 << (kind.bits - 1)).to(torch.uint8)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the values nearest to x, fp32, any shape, without their codes."""
        steps, octave = self._steps(x)
        return steps.mul_(octave).mul_(0.5**self.element.mantissa_bits)

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values nearest to x in steps of their octaves' 2**-mantissa_bits, and the octaves."""
        kind = self.element
        x = x.clamp(-kind.largest, kind.largest)
        octave = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=2.0 ** (1 - kind.bias))
        steps = (x * (2.0**kind.mantissa_bits)).div_(octave).round_()  # below 2**(mantissa_bits + 1)
        return steps, octave
