"""GSQ: codes of a plain symmetric grid, learned by a relaxed choice among neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.tuners.gsq import GSQ


@METHODS.register("gsq")
@dataclass(frozen=True)
class GSQMethod(Method):
    """GSQ: learn which of its neighbouring levels each weight takes, by the error of whole blocks.

    Problem    gptq rounds for each layer alone and never takes a code back; the best codes for a block differ
    Equation   W^ = sum_k softmax(logits / temperature)_k level_k; logits and scales by Adam on
               ||block(x; W^) - float block||^2, the temperature falling until one level is left
    Needs      calibration text; the float model's hidden states in addition to the quantized ones
    Stored     an ordinary uniform grid, symmetric by default, as gptq stores it
    Cost       gptq's; a forward and a backward pass an epoch; memory for `neighbours` numbers a weight and Adam's
    Expect     below gptq on the same grid at 2 and 3 bits
    Limits     a reading of the published idea, whose details are not public
    Paper      GSQ (IST-DASLab 2026); for two neighbours AdaRound (Nagel et al. 2020, arXiv 2004.10568)
    """

    bits: int = option(2, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(True, "fix the zero in the middle and store none")
    epochs: int = option(2, "passes over the calibration text")
    neighbours: int = option(3, "levels that a weight chooses among")
    rate: float = option(1e-1, "learning rate of the choices")
    rate_params: float = option(3e-3, "learning rate of scales and zeros, in units of their root mean square")
    temperature: float = option(1.0, "of the choice at the start; falls to a tenth")
    noise: float = option(0.0, "share of Gumbel noise in the choice")
    tokens: int = option(512, "tokens in a step")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, GPTQ, and the tuner that chooses again."""
        tuner = GSQ(
            self.epochs, self.neighbours, self.rate, self.rate_params, self.temperature, self.noise, self.tokens
        )
        return Recipe("gsq", Uniform(self.bits, self.group_size, self.symmetric), GPTQ(), tuners=(tuner,))
