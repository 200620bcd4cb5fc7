"""HQQ: half-quadratic quantization."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.hqq import HQQ


@METHODS.register("hqq")
@dataclass(frozen=True)
class HQQMethod(Method):
    """HQQ: move the zero of every group so that the errors of its weights become sparse.

    Problem    a grid from min to max follows the outliers of a group, and there is no text to weigh them with
    Equation   min over z of sum |w - scale * (q - z)|^p, q = clamp(round(w / scale + z)), p = 0.7
    Symbols    scale min-max, kept; z the zero, a float; split into a soft threshold for the errors and a mean
               for z, in turns, the coupling beta growing
    Stored     codes, fp16 scale and fp16 zero: bits + 32/group_size bits per weight
    Needs      nothing: no text, no forward pass
    Cost       about ten times round to nearest; memory of one block
    Expect     a smaller error of the weights than round to nearest with equal bits and groups, at 4 bits
               by far; that is not a smaller perplexity at 3 bits and below, where zeros that are no longer
               exact cost more
    Limits     made for groups: one zero a row moves little; the zero costs as many bits as the scale
    Paper      Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale and a zero, or 'row' or 'tensor'")
    p: float = option(0.7, "norm of the errors, up to 1")
    beta: float = option(10.0, "coupling of the split at the start, in steps of the grid")
    growth: float = option(1.01, "factor on beta after every round")
    rounds: int = option(20, "turns between errors and zeros")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format with a float zero, HQQ solver."""
        format = Uniform(self.bits, self.group_size, zero="float")
        return Recipe("hqq", format, HQQ(self.p, self.beta, self.growth, self.rounds))
