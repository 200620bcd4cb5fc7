"""FP8 with dynamic inputs: weights and activations as 8-bit floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.float import Float
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest


@METHODS.register("fp8_dynamic")
@dataclass(frozen=True)
class FP8Dynamic(Method):
    """E4M3 weights with a scale a row, E4M3 activations with a scale a token or a part of one.

    Problem    the number type that recent GPUs multiply at twice the speed of bf16
    Equation   y = s_x s_w (e4m3(x / s_x) e4m3(w / s_w)^T),  s = max |.| / 448
    Stored     8-bit codes, fp16 a row
    Needs      nothing; with gptq the Gram matrix of every layer's inputs (calibration text)
    Cost       seconds; memory of one block
    Expect     near weight-only fp8: a token's inputs span octaves, which an exponent covers. Scales for fewer
               columns, and of least error, lower the error of the inputs; fewer kernels have them
    Limits     processors multiply no fp8: the products are those of fp32, exact, and not faster
    Paper      Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433); the granularity is
               that of vLLM's FP8_DYNAMIC
    """

    gptq: bool = option(False, "round weights with error feedback in place of to nearest")
    input_group: GroupSize = option("row", "inputs that share a scale: columns of a token, 'row' for a token")
    search: bool = option(False, "scales of inputs of least error in place of those of the largest")

    def recipe(self) -> Recipe:
        """Return a recipe: float formats of weights and inputs, nearest or GPTQ solver."""
        solver = GPTQ(search=False) if self.gptq else Nearest()
        inputs = Inputs(Float(8, self.input_group), search=self.search)
        return Recipe("fp8_dynamic", Float(8, "row"), solver, inputs=inputs)
