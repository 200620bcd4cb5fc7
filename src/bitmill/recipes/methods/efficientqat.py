"""EfficientQAT: weights, scales and zeros of one block after another, trained together."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest
from bitmill.tuners.block_ap import BlockAP


@METHODS.register("efficientqat")
@dataclass(frozen=True)
class EfficientQATMethod(Method):
    """EfficientQAT: train all parameters of a block to the float block's outputs, then scales from end to end.

    Problem    at 2 and 3 bits a grid that fits the weights is not enough: weights must move to suit the grid, and
               training all of a model at once takes its optimizer's memory several times over
    Equation   W^ = s (clip(round(W / s) + z) - z); W, s and z by Adam on ||block(x; W^) - float block||^2
    Needs      calibration text; the float model's hidden states in addition to the quantized ones
    Stored     an ordinary uniform grid, as rounding to nearest stores it
    Cost       a forward and a backward pass over the calibration text an epoch, and a forward pass more
    Expect     far below gptq at 2 bits; more text and epochs keep helping
    Next       `bitmill train MODEL --method efficientqat --loss next-token --learn scales` adds the paper's second
               phase (E2E-QP)
    Paper      Chen et al. 2024 (arXiv 2407.11062)
    """

    bits: int = option(2, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    epochs: int = option(2, "passes over the calibration text")
    rate: float = option(3e-3, "learning rate of weights, in units of their root mean square")
    rate_params: float = option(3e-3, "learning rate of scales and zeros, in units of their root mean square")
    tokens: int = option(512, "tokens in a step")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, nearest solver, Block-AP."""
        tuner = BlockAP(self.epochs, self.rate, self.rate_params, self.tokens)
        format = Uniform(self.bits, self.group_size, self.symmetric)
        return Recipe("efficientqat", format, Nearest(search=True), tuners=(tuner,))
