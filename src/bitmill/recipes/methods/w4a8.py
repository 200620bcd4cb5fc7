"""W4A8: weights of 4 bits by GPTQ, inputs of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ


@METHODS.register("w4a8")
@dataclass(frozen=True)
class W4A8(Method):
    """GPTQ's 4-bit weights, multiplied with activations as 8-bit integers.

    Problem    small weights for decoding and integer products for prompts, in one folder
    Equation   y = s_x s_w (q_x (q_w - z_w)^T), a scale for 64 columns of a token and one a group of weights
    Needs      the Gram matrix of every layer's inputs (calibration text)
    Cost       gptq's
    Expect     what gptq has at these bits, and the little that 8-bit inputs cost
    Paper      Frantar et al. 2022 (arXiv 2210.17323) for the weights; the inputs as in w8a8
    """

    bits: int = option(4, "bits of a weight's code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    input_group: GroupSize = option(64, "inputs that share a scale: columns of a token, 'row' for a token")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform formats of weights and inputs, GPTQ solver."""
        inputs = Inputs(Uniform(8, self.input_group, symmetric=True))
        return Recipe("w4a8", Uniform(self.bits, self.group_size), GPTQ(damp=self.damp), inputs=inputs)
