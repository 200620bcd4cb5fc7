"""ASQ: static scales of activations, adapted to every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats import Format
from bitmill.formats.power_of_two import PowerOfSqrtTwo
from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("asq")
@dataclass(frozen=True)
class ASQ(Method):
    """ASQ: the scale of a layer's inputs times a factor that follows from each token's mean magnitude.

    Problem    one scale for all inputs suits no token whose magnitudes are other than most; the largest input of a
               token, of which dynamic scales are made, is a few times too large for most numbers at 4 bits
    Equation   x^ = s beta clamp(round(x / (s beta))),  beta = max(g mean |x| / s + o, least);  g, o >= 0
    Symbols    s scale of the layer, of least error of its outputs (LSQ's step, with adaptive=false alone);
               g, o fitted to the best scales of sampled tokens
    Needs      calibration text
    Stored     codes and fp16 a group of weights; scale, gain and offset a layer
    Cost       seconds a block
    Expect     below the error of the static scale alone at 4 bits
    Limits     channels of outliers, as language models have them, break 4 bits of inputs with a scale a token: add
               --transform hadamard, or take 8 bits. The paper trains s, the weights and a net of two layers that
               computes beta from a picture's channel means; a token has no pictures to average over. Powers of
               sqrt(2) (weights=post) multiply in floats
    Paper      "ASQ + POST" 2025 (arXiv 2504.17263)
    """

    bits: int = option(4, "bits of a weight, 2 to 7")
    act_bits: int = option(4, "bits of an input, 1 to 8")
    weights: Literal["uniform", "post"] = option("uniform", "levels of weights")
    group_size: GroupSize = option(64, "input columns that share a scale of weights, or 'row' or 'tensor'")
    adaptive: bool = option(True, "scales of tokens; false keeps the static one")
    symmetric: bool = option(True, "levels of inputs around 0; false for inputs of mostly one sign")

    def recipe(self) -> Recipe:
        """Return a recipe: weights to nearest, static inputs with a factor for each token."""
        post = self.weights == "post"
        weight: Format = (PowerOfSqrtTwo if post else Uniform)(self.bits, self.group_size)
        levels = Uniform(self.act_bits, "tensor", symmetric=self.symmetric)
        inputs = Inputs(levels, static=True, simulated=post, search=True, adaptive=self.adaptive)
        return Recipe("asq", weight, Nearest(search=True), inputs=inputs)
