"""LLM.int8(): 8-bit products, and float ones for the few columns with very large inputs."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("llm_int8")
@dataclass(frozen=True)
class LLMInt8(Method):
    """LLM.int8(): columns whose inputs reach a threshold are multiplied in float, all others in 8-bit integers.

    Problem    a few channels of the activations are up to a hundred times larger than the rest, and one scale a
               token leaves the rest a handful of levels
    Equation   y = sum over columns with max |x_c| >= threshold of x_c w_c, + s_x s_w (q_x q_w^T) over the others
    Stored     8-bit codes, fp16 a row
    Needs      nothing: the columns are found in every call
    Cost       seconds; memory of one block
    Expect     W8A8 at the quality of 8-bit weights
    Limits     which columns are large depends on all tokens of a call: a token's outputs depend a little on the
               tokens that run with it
    Paper      Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 3
    """

    threshold: float = option(6.0, "magnitude from which on a column is multiplied in float; 0 for none")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform formats of 8 bits with a threshold of the inputs, nearest solver."""
        inputs = Inputs(Uniform(8, "row", symmetric=True), threshold=self.threshold)
        return Recipe("llm_int8", Uniform(8, "row", symmetric=True), Nearest(), inputs=inputs)
