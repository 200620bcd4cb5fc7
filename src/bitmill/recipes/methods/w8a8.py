"""W8A8: weights and inputs of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("w8a8")
@dataclass(frozen=True)
class W8A8(Method):
    """Weights and activations as 8-bit integers, rounded to nearest.

    Problem    prompts are bound by arithmetic, and processors multiply integers of 8 bits faster than floats
    Equation   y = s_x s_w (q_x q_w^T),  s = max |.| / 127.5 of a token and of a row
    Stored     8-bit codes, fp16 a row
    Needs      nothing: no text, no forward pass; a static scale takes calibration text
    Cost       seconds; memory of one block
    Expect     near float where no channel is far larger than the rest; there smoothquant or a threshold helps
    Paper      Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2, vector-wise quantization
    """

    group_size: GroupSize = option("row", "weights that share a scale: input columns, 'row' or 'tensor'")
    input_group: GroupSize = option("row", "inputs that share a scale: columns of a token, 'row' for a token")
    static: bool = option(False, "one scale for all inputs of a layer, from calibration")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform formats of weights and inputs, nearest solver."""
        inputs = Uniform(8, "tensor" if self.static else self.input_group, symmetric=True)
        weight = Uniform(8, self.group_size, symmetric=True)
        return Recipe("w8a8", weight, Nearest(), inputs=Inputs(inputs, self.static))
