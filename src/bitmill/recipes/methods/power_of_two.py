"""Power of two: weights whose products are shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.errors import RecipeError
from bitmill.formats.power_of_two import PowerOfTwo
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest


@METHODS.register("power_of_two")
@dataclass(frozen=True)
class PowerOfTwoMethod(Method):
    """Powers of two (PoT): 0 and signed powers of 2, times a scale.

    Problem    multiplications are most of the energy and area of a chip; a product with a power of 2 is a shift
    Equation   W^ = +-scale 2^-k, k = 0, 1, ..., 2^(bits - 1) - 2, or 0;   x W^ = +-scale (x >> k) for integers x
    Stored     sign and power in `bits` bits, fp16 a group
    Needs      nothing: no text, no forward pass; solver=gptq calibration text
    Cost       seconds; with gptq as the method gptq
    Expect     above the error of uniform levels from 4 bits: between half of the largest weight and all of it
               there is no level, and more bits add only smaller ones
    Limits     the paper trains the network with these levels, here they are fitted to trained weights; its scale
               is a power of 2 as well; kernels look the levels up, since processors multiply as fast as they shift
    Paper      Przewlocka-Rus et al. 2022 (arXiv 2203.05025)
    """

    bits: int = option(4, "bits of a code, 2 to 6")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    solver: Literal["nearest", "gptq"] = option("nearest", "how weights are rounded")
    rounding: Literal["value", "log"] = option("value", "round to the nearest level, or the nearest logarithm")
    search: bool = option(True, "fit each scale to the least squared error instead of the largest weight")

    def recipe(self) -> Recipe:
        """Return a recipe: format of powers of 2, nearest or GPTQ solver.

        Raises:
            RecipeError: logarithms are to be rounded with error feedback.
        """
        if self.rounding == "log" and self.solver != "nearest":
            raise RecipeError(
                f"rounding=log is that of solver=nearest, not {self.solver!r}; leave one of them out."
            )
        solver: Solver = GPTQ(search=self.search)
        if self.solver == "nearest":
            solver = Nearest(search=self.search, distance=self.rounding)
        return Recipe("power_of_two", PowerOfTwo(self.bits, self.group_size), solver)
