"""AWQ: activation-aware scaling, then clipped rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.clip import Clip
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.awq import AWQ


@METHODS.register("awq")
@dataclass(frozen=True)
class AWQMethod(Method):
    """AWQ: scale salient channels up before rounding, and fold the inverse into the layer before.

    Problem    few weights carry most of the output error, those that read channels of large magnitude
    Equation   W^ = Q(W s) / s, s_c = mean|x_c|^r / sqrt(max_c min_c), r on a grid by the outputs' error; then
               every group's range is cut to the share of least output error
    Needs      the Gram matrix and the mean |x| of every layer's inputs (calibration text)
    Stored     an ordinary uniform grid; the scales are folded away
    Cost       two passes over the calibration text, and a rounding of every layer per point of the grid
    Expect     between rounding to nearest and gptq at 3 and 4 bits; 2 bits fail on small models
    Limits     scales exist only at seams: where no norm or linear precedes exactly (GPT-2's projections), none is
        used;
               errors of a layer's own outputs decide, where the authors run the parent module
    Paper      Lin et al. 2023 (arXiv 2306.00978)
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    grid: int = option(20, "exponents of mean |x| that are tried")
    clip: bool = option(True, "search clipped ranges after scaling")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, AWQ's scales, clip or nearest solver."""
        solver: Solver = Clip() if self.clip else Nearest()
        return Recipe("awq", Uniform(self.bits, self.group_size, self.symmetric), solver, (AWQ(grid=self.grid),))
