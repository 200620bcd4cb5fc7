"""LoRC: rounding, and a product of low rank that corrects it."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.low_rank import LowRank
from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest


@METHODS.register("lorc")
@dataclass(frozen=True)
class LoRC(Method):
    """LoRC: add the best product of two thin fp16 matrices to what rounding left.

    Problem    4-bit weights of small models are off by more than error feedback can repair
    Equation   W^ = Q(W) + U V,  U V the rank-r part of (W - Q(W)) L, taken back by L^-1;  G = L L^T
    Stored     rtn's or gptq's, and 16 r (rows + columns) bits a layer
    Needs      the Gram matrix of every layer's inputs (calibration text); without weighted and gptq nothing
    Cost       one singular value decomposition a layer; two thin products a layer at run time
    Expect     most of what a larger group would gain, at fewer bits; more on top of rounding to nearest
    Paper      Yao et al. 2023, "ZeroQuant-V2" (arXiv 2303.08302), section 5, where the error is unweighted
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    rank: int = option(8, "columns of U and rows of V")
    weighted: bool = option(True, "take the part that changes the outputs most, not the weights")
    gptq: bool = option(False, "round with error feedback in place of to nearest")

    def recipe(self) -> Recipe:
        """Return a recipe: low rank around a uniform format, nearest or GPTQ solver."""
        format = LowRank(Uniform(self.bits, self.group_size), self.rank, self.weighted)
        return Recipe("lorc", format, GPTQ() if self.gptq else Nearest())
