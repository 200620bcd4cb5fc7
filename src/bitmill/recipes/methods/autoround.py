"""AutoRound: rounding learned from the signs of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest
from bitmill.tuners.autoround import AutoRound


@METHODS.register("autoround")
@dataclass(frozen=True)
class AutoRoundMethod(Method):
    """AutoRound: learn for every weight whether it is rounded up or down, and for every group its range.

    Problem    rounding to nearest minimises the error of each weight, not of what the block computes
    Equation   W^ = scale * (clip(round(W / scale + V) + zero) - zero), scale and zero of the range
               [beta min W, alpha max W];  V -= rate * sign(dL/dV), alpha and beta alike
    Symbols    V in [-1/2, 1/2] one a weight, alpha and beta in (0, 1] one a group, L squared distance of the
               block's outputs from the float model's; the rate falls linearly from 1 / iters to 0
    Needs      calibration text, and gradients of one block at a time
    Stored     what rtn stores: codes, scale and zero
    Cost       iters forward and backward passes of `tokens` tokens a block
    Expect     4 bits close to float; well below gptq's perplexity at 2 bits
    Limits     uniform grids only; the paper takes 200 steps of 8 windows of 2048 tokens, here steps are small
    Paper      Cheng et al. 2023 (arXiv 2309.05516)
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    iters: int = option(100, "steps a block")
    rate: float = option(0.0, "rate of the first step; 0 for 1 / iters")
    tokens: int = option(512, "tokens in a step")
    search: bool = option(True, "start from the ranges of least weight error instead of min-max")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, AutoRound tuner; the solver has nothing left to do."""
        tuner = AutoRound(self.iters, self.rate, self.tokens, self.search)
        format = Uniform(self.bits, self.group_size, self.symmetric)
        return Recipe("autoround", format, Nearest(), tuners=(tuner,))
