"""POST: weights that are powers of the square root of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.power_of_two import PowerOfSqrtTwo
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest


@METHODS.register("post")
@dataclass(frozen=True)
class POST(Method):
    """POST: 0 and signed powers of the square root of 2, times a scale.

    Problem    between two powers of 2 there is no level, and additional bits add only smaller ones
    Equation   W^ = +-scale 2^(-k / 2), k = 0, 1, ..., 2^(bits - 1) - 2, or 0: exactly 2^bits codes
    Symbols    the spare code, that of a negative 0, stores the next negative power
    Stored     sign and power in `bits` bits, fp16 a group
    Needs      nothing: no text, no forward pass; solver=gptq calibration text
    Cost       seconds; with gptq as the method gptq
    Expect     at 4 bits and more less error than powers of 2; at 3 bits its smallest levels are too large for
               weights around 0
    Limits     the paper trains the network with these levels (and activations by ASQ), here they are fitted to
               trained weights; its released code has powers of 2 in place of those of sqrt(2)
    Paper      "ASQ + POST" 2025 (arXiv 2504.17263)
    """

    bits: int = option(4, "bits of a code, 2 to 7")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    solver: Literal["nearest", "gptq"] = option("nearest", "how weights are rounded")
    search: bool = option(True, "fit each scale to the least squared error instead of the largest weight")

    def recipe(self) -> Recipe:
        """Return a recipe: format of powers of sqrt(2), nearest or GPTQ solver."""
        solver: Solver = GPTQ(search=self.search) if self.solver == "gptq" else Nearest(search=self.search)
        return Recipe("post", PowerOfSqrtTwo(self.bits, self.group_size), solver)
