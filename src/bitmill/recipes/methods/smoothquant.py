"""SmoothQuant: W8A8 after moving the size of activations into the weights."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.smooth import SmoothQuant


@METHODS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuantMethod(Method):
    """SmoothQuant: scale large input channels down, their weights up, then round both to 8 bits.

    Problem    a few input channels are far larger than the rest, so that a token's scale leaves the others few
               levels; weights have no such channels
    Equation   s_c = max|x_c|^alpha / max|w_c|^(1 - alpha);  y = (x / s) (s w)^T, both rounded
    Stored     8-bit codes, fp16 a row; s is folded into the layer before
    Needs      the magnitudes of every layer's inputs (calibration text)
    Cost       one pass over the calibration text
    Expect     W8A8 within a percent of float
    Limits     every seam is scaled where the paper scales behind norms only, and alpha is chosen for each seam by
               the error that both roundings are expected to leave
    Paper      Xiao et al. 2022 (arXiv 2211.10438)
    """

    search: bool = option(True, "choose the alpha of each seam by the expected error")
    alpha: float = option(0.5, "share of the size that moves, 0 to 1, without search")
    bits: int = option(8, "bits of a weight's code, 1 to 8")
    group_size: GroupSize = option("row", "input columns that share a scale of weights, or 'row' or 'tensor'")
    input_group: GroupSize = option("row", "inputs that share a scale: columns of a token, 'row' for a token")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform formats of weights and inputs behind the transform, nearest solver."""
        inputs = Inputs(Uniform(8, self.input_group, symmetric=True))
        weight = Uniform(self.bits, self.group_size, symmetric=True)
        return Recipe("smoothquant", weight, Nearest(), (SmoothQuant(self.alpha, self.search),), inputs=inputs)
