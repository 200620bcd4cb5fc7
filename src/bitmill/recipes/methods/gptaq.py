"""GPTAQ: GPTQ with asymmetric calibration."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptaq import GPTAQ


@METHODS.register("gptaq")
@dataclass(frozen=True)
class GPTAQMethod(Method):
    """GPTAQ: GPTQ whose layers also compensate for the errors of the layers before them.

    Problem    GPTQ matches each layer's output on inputs that are wrong already, and errors add up with depth
    Equation   minimise ||X_float W^T - X W^^T||^2, X_float the float model's inputs, X the quantized model's:
               W is first moved by alpha W D (G + damp I)^-1, D = (X_float - X)^T X / tokens
    Needs      the Gram matrix of every layer's inputs and the cross-Gram D (calibration text)
    Cost       GPTQ's, one more forward pass and twice the activations in memory
    Expect     gptq's size and format, with errors that grow less with depth
    Limits     nothing to gain where statistics come from the float model alone (propagate float)
    Paper      Li et al. 2025 (arXiv 2504.02692)
    """

    bits: int = option(4, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    alpha: float = option(0.5, "share of the correction, 0 to 1")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(True, "visit columns by falling mean square of their input")
    search: bool = option(True, "shrink each range to the least weighted error instead of min-max")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, GPTAQ solver."""
        solver = GPTAQ(damp=self.damp, act_order=self.act_order, search=self.search, alpha=self.alpha)
        return Recipe("gptaq", Uniform(self.bits, self.group_size, self.symmetric), solver)
