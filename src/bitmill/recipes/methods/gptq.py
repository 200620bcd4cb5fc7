"""GPTQ: second-order rounding on a uniform grid."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ


@METHODS.register("gptq")
@dataclass(frozen=True)
class GPTQMethod(Method):
    """GPTQ: round column by column and let the remaining columns absorb the error.

    Problem    least squared error of each layer's output, W fixed, one shot, no gradients
    Equation   e_j = (w_j - round(w_j)) / U_jj,  w_k -= e_j U_jk for k > j,  (G + damp I)^-1 = U^T U
    Needs      the Gram matrix G of every layer's inputs (calibration text)
    Cost       about one forward pass over the calibration text, plus as much again for the Gram matrices
    Expect     4 bits in groups of 64 close to float; 3 bits usable; 2 bits poor on small models
    Paper      Frantar et al. 2022 (arXiv 2210.17323)
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(True, "visit columns by falling mean square of their input")
    static_groups: bool = option(True, "fit all grids before the loop; act_order needs it")
    search: bool = option(True, "shrink each range to the least weighted error instead of min-max")
    importance: str = option("diagonal", "weight of a column's error in the search: 'diagonal' or 'inverse'")
    column_passes: int = option(0, "rounds of re-rounding columns after the loop (not in the paper)")
    group_passes: int = option(0, "rounds of refitting groups after the loop (not in the paper)")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, GPTQ solver."""
        return Recipe(
            "gptq",
            Uniform(self.bits, self.group_size, self.symmetric),
            GPTQ(
                damp=self.damp,
                act_order=self.act_order,
                static_groups=self.static_groups,
                search=self.search,
                importance=self.importance,  # type: ignore[arg-type]
                column_passes=self.column_passes,
                group_passes=self.group_passes,
            ),
        )
