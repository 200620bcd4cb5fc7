"""Signed scale: a fixed table times an fp16 scale of either sign a group, W^ = scale * table[code].

    code   unsigned, `bits` bits
    scale  fp16, one a group; a negative one turns the table around
    table  "even" -2**(bits-1) .. 2**(bits-1) - 1, or "iq4_nl", 16 numbers that lie closer around 0

The table reaches further on its negative side; the sign of the scale gives each group that side where its weights
reach further. In groups of 32 these are the types Q4_0, Q5_0, Q8_0 and IQ4_NL of GGUF. Bits a weight:
bits + 16/group_size.

Source: ggml/src/ggml-quants.c of llama.cpp. The search over scales is bitmill's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import FP16_TINY, as_stored
from bitmill.formats.part import Part
from bitmill.formats.scaled import Scaled
from bitmill.numerics.grouping import GroupSize
from bitmill.numerics.table import Table

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TableName = Literal["even", "iq4_nl"]
SHARES = tuple(round(sign * (1.15 - k / 20), 2) for sign in (1, -1) for k in range(12))  # 1.15 to 0.6


@dataclass(frozen=True)
class SignedTable(Scaled):
    """Base of the formats whose factors have signs, with one of two tables."""

    group_size: GroupSize = 32
    table_name: TableName = "even"

    signed: ClassVar[bool] = True
    shares: ClassVar[tuple[float, ...]] = SHARES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table_name == "iq4_nl" and self.bits != 4:
            raise RecipeError(f"bits is {self.bits!r}, but the table iq4_nl has 4; set bits=4.")
        if self.bits < 2:
            raise RecipeError(f"{self.name} stores 2 to {self.max_bits} bits, not {self.bits!r}; use 2 or more.")

    def table(self, device: torch.device) -> Table:
        """Return the table."""
        middle = 1 << (self.bits - 1)
        values = range(-middle, middle) if self.table_name == "even" else IQ4_NL
        return Table(torch.tensor(values, dtype=torch.float32, device=device))

    def ideal_start(self, x: Tensor) -> Tensor:
        """Return the factor, not rounded, that maps the number of largest magnitude to the first of the table.

        Args:
            x: (rows, groups, width).

        Returns:
            (rows, groups).
        """
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
        return largest / float(self._table(x.device).values[0])


@FORMATS.register("signed_scale")
@dataclass(frozen=True)
class SignedScale(SignedTable):
    """A table with one fp16 scale of either sign a group; `bits` 2 to 8."""

    def factor(self, params: Params) -> Tensor:
        """Return the scale."""
        return params["scale"]

    def start(self, x: Tensor) -> Params:
        """Map the number of largest magnitude to the first of the table."""
        return self.with_factor(self.ideal_start(x), {})

    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Store the scale in fp16.

        Returns:
            "scale" (rows, groups), never 0.
        """
        return {"scale": signed(factor)}

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the fp16 scale."""
        return (Part("scale", self.grid(shape)),)


def signed(scale: Tensor) -> Tensor:
    """Round scales of either sign to fp16, and replace 0 by 1, since any scale stores a group of zeros exactly."""
    stored = as_stored(scale)
    tiny = torch.where(scale < 0, -FP16_TINY, FP16_TINY)
    stored = torch.where(stored == 0, tiny, stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)
