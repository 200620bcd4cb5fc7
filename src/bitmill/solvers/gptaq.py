"""GPTAQ: GPTQ towards the outputs of the float model, from the inputs that the quantized model produces.

Problem    minimise || X_float W^T - X W^^T ||^2: the inputs X already carry the errors of earlier layers, and the
           layer should undo as much of them as it can
Equation   with D = (X_float - X)^T X / tokens and G = X^T X / tokens, the best real-valued matrix is
           W* = W + W D (G + damp I)^-1, and || X W*^T - X W^^T ||^2 is GPTQ's problem; alpha scales the step
Needs      the Gram matrix and the cross-Gram D: the float blocks run in addition to the quantized ones
Cost       GPTQ's, one more forward pass, and one triangular solve a layer
Limits     D is estimated from the calibration text and fits it: alpha below 1 is a shrinkage

Li et al. 2025, "GPTAQ" (arXiv 2504.02692). The paper spreads this correction over the remaining columns while
it rounds (strictly upper part, alpha 0.25); here it is applied to all columns at once, before the loop, so that
any format and order can follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.numerics.cholesky import inverse_factor
from bitmill.numerics.statistics import Statistics
from bitmill.solvers.base import SOLVERS
from bitmill.solvers.feedback import zero_dead_inputs
from bitmill.solvers.gptq import GPTQ


@SOLVERS.register("gptaq")
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Error feedback with asymmetric calibration."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha!r}; use a share of the correction from 0 to 1.")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix, and with alpha the cross-Gram with the float model's inputs."""
        return super().needs | {"cross"} if self.alpha else super().needs

    def target(self, W: Tensor, stats: Statistics) -> Tensor:
        """Return W corrected for the errors of earlier layers.

        Raises:
            NumericsError: when stats.gram or stats.cross is missing.
        """
        return corrected_target(W, stats, self.alpha, self.damp, self.name)


def corrected_target(W: Tensor, stats: Statistics, alpha: float, damp: float, solver: str) -> Tensor:
    """Return the matrix to quantize in place of W, the share `alpha` of the way to W*.

    Args:
        W: fp32 (rows, columns).
        stats: of the layer.
        alpha: 0 to 1.
        damp: share of the Gram's mean diagonal added to it.
        solver: its name, for the error message.

    Raises:
        NumericsError: when there are no statistics of the float model's inputs.
    """
    if not alpha:
        return W
    cross = stats.required_cross(solver)
    if not bool(cross.any()):
        return W
    _, gram, _ = zero_dead_inputs(W, stats.required_gram(solver))  # the cross-Gram is 0 at dead inputs
    U, _ = inverse_factor(gram, damp)
    return W + alpha * ((W @ cross) @ U.T) @ U
