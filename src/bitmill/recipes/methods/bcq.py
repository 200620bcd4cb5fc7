"""BCQ: alternating multi-bit binary coding."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.binary_coding import BinaryCoding
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.alternating import Alternating


@METHODS.register("bcq")
@dataclass(frozen=True)
class BCQ(Method):
    """Binary coding by alternating least squares.

    Problem    non-uniform levels that a multiplication-free kernel can run
    Equation   min ||w - sum_i alpha_i b_i||^2, b_i in {-1, +1}: codes and alpha in turns
    Needs      nothing; with weighted=true the mean square of every input
    Cost       seconds to a minute; no forward pass unless weighted
    Expect     better than round to nearest below 4 bits, worse than error feedback; with 16 bits a magnitude,
               small groups are expensive (3 bits in groups of 64: 3.75 bits per weight)
    Paper      Xu et al. 2018 (arXiv 1802.00150); used for language models by LUT-GEMM (arXiv 2206.09557)
    """

    bits: int = option(3, "binary planes, 1 to 5")
    group_size: GroupSize = option(128, "input columns that share magnitudes, or 'row' or 'tensor'")
    rounds: int = option(15, "turns between codes and magnitudes")
    weighted: bool = option(False, "count errors by the mean square of their input")

    def recipe(self) -> Recipe:
        """Return a recipe: binary coding, alternating solver."""
        solver = Alternating(self.rounds, "diagonal" if self.weighted else "nothing")
        return Recipe("bcq", BinaryCoding(self.bits, self.group_size), solver)
