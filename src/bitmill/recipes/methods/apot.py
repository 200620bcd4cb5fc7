"""APoT: weights that are sums of powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.apot import AdditivePowersOfTwo
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest


@METHODS.register("apot")
@dataclass(frozen=True)
class APoT(Method):
    """APoT: sums of a few powers of 2 as levels, times a scale.

    Problem    powers of 2 are too coarse for large weights, and more bits do not help
    Equation   W^ = +-scale sum_i p_i,  p_i 0 or one of three powers of 2 of its own (k = 2 bits a term)
    Stored     sign and number of the sum in `bits` bits, fp16 a group
    Needs      nothing: no text, no forward pass; solver=gptq calibration text
    Cost       seconds; with gptq as the method gptq
    Expect     below the error of powers of 2 from 4 bits, and about that of uniform levels; 3 bits are powers of 2
    Limits     the paper trains the network with these levels and a learned clipping threshold, here they are
               fitted to trained weights
    Paper      Li et al. 2020 (arXiv 1909.13144)
    """

    bits: int = option(4, "bits of a code, 3 to 7")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    solver: Literal["nearest", "gptq"] = option("nearest", "how weights are rounded")
    search: bool = option(True, "fit each scale to the least squared error instead of the largest weight")

    def recipe(self) -> Recipe:
        """Return a recipe: format of additive powers of 2, nearest or GPTQ solver."""
        solver: Solver = GPTQ(search=self.search) if self.solver == "gptq" else Nearest(search=self.search)
        return Recipe("apot", AdditivePowersOfTwo(self.bits, self.group_size), solver)
