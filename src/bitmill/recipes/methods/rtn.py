"""RTN: round to nearest, the data-free baseline."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("rtn")
@dataclass(frozen=True)
class RTN(Method):
    """Round to nearest on a uniform grid.

    Problem    the cheapest quantization there is, and the floor every method must beat
    Equation   W^ = scale * (clamp(round(W / scale) + zero) - zero)
    Needs      nothing: no text, no forward pass
    Cost       seconds; memory of one block
    Expect     near float at 8 bits, small loss at 4 bits in groups of 64, breaks below 4 bits
    Paper      Jacob et al. 2018 (arXiv 1712.05877)
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    search: bool = option(False, "shrink each range to the least squared weight error instead of min-max")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, nearest solver."""
        return Recipe("rtn", Uniform(self.bits, self.group_size, self.symmetric), Nearest(search=self.search))
