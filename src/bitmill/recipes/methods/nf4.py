"""NF4: quantiles of the normal distribution as levels."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.normal_float import NormalFloat
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("nf4")
@dataclass(frozen=True)
class NF4(Method):
    """NormalFloat: levels at the quantiles of a normal distribution, scaled to each group's largest magnitude.

    Problem    weights are bell-shaped, so evenly spaced levels are dense where weights are few
    Equation   W^ = absmax * q[code], q the 16 quantiles of N(0, 1) that QLoRA prints, -1, 0 and 1 among them
    Symbols    absmax largest magnitude of a group; with double = true scale * (step + 1) / 256, scale fp16 a
               row, step one byte a group
    Stored     4-bit codes and 8 bits a group, 16 a row: 4.13 bits per weight at 2048 columns; without double
               16 bits a group
    Needs      nothing: no text, no forward pass
    Cost       seconds; memory of one block
    Expect     below the error of a symmetric 4-bit grid in equal groups, and about that of an asymmetric
               one, which also stores a zero; ahead of both where weights have heavy tails
    Limits     4 bits as published; the tables for 2 and 3 bits are bitmill's, and at 2 bits three of four
               levels are -absmax, 0 and absmax; search=true lowers the error of the weights, and not always
               the perplexity
    Paper      Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314)
    """

    bits: int = option(4, "bits of a code: 4 as published, or 2 or 3")
    group_size: GroupSize = option(64, "input columns that share an absmax, or 'row' or 'tensor'")
    double: bool = option(True, "quantize the absmax again, to 8 bits")
    search: bool = option(False, "shrink each absmax to the least squared weight error")

    def recipe(self) -> Recipe:
        """Return a recipe: normal-float format, nearest solver."""
        return Recipe("nf4", NormalFloat(self.bits, self.group_size, self.double), Nearest(search=self.search))
