"""Block-AP: all parameters of a block learn together, its float weights and the scales and zeros of their formats.

    W^ = scale * (clip(round(W / scale) + zero) - zero)      gradients of W, scale and zero pass the rounding

Inputs are those that the quantized blocks before produce, targets the float model's hidden states. Codes follow
from the weights, which are freed afterwards: the result is an ordinary quantized block. Any format can be trained
so, from any solver's result: see `numerics.straight_through` for the gradients. The paper's thousands of steps
have learning rates of 2e-5 for weights and 1e-4 for scales and zeros; those for a few hundred are larger, and in
units of each parameter's root mean square.

Source: EfficientQAT (Chen et al. 2024, arXiv 2407.11062), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.tuners.base import TUNERS, BlockTask, Tuner
from bitmill.tuners.learned_matrix import LearnedMatrix, start_weights
from bitmill.tuners.training import Schedule, adam, learn_codes, rms_rate


@TUNERS.register("block_ap")
@dataclass(frozen=True)
class BlockAP(Tuner):
    """Train the weights of a quantized block, and the parameters of their formats.

    epochs: passes over the calibration windows.  tokens: in a step.
    rate, rate_params: of Adam for weights, and for scales and zeros, in units of their root mean square; both fall
        to a twentieth along a cosine.
    which: "weights", the formats' "params", or "all".
    """

    epochs: int = 2
    rate: float = 3e-3
    rate_params: float = 3e-3
    tokens: int = 512
    which: Literal["all", "weights", "params"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.tokens) < 1 or not (self.rate > 0 and self.rate_params > 0):
            raise RecipeError(
                f"block_ap has epochs {self.epochs}, tokens {self.tokens}, rate {self.rate} and rate_params "
                f"{self.rate_params}; use numbers above 0."
            )

    def after(self, task: BlockTask) -> None:
        """Train, and leave the block in the best state that can be stored."""
        matrices = {}
        groups: list[tuple[list[Tensor], float]] = []
        for name, quantized in task.quantized.items():
            matrix = LearnedMatrix(start_weights(task.originals[name], quantized), quantized)
            matrix.weight.requires_grad_(self.which != "params")
            for parameter in matrix.learned_params():
                parameter.requires_grad_(self.which != "weights")
            learned = [(matrix.weight, self.rate), *((p, self.rate_params) for p in matrix.learned_params())]
            groups += [([leaf], rms_rate(leaf, rate)) for leaf, rate in learned if leaf.requires_grad]
            matrices[name] = matrix
        if groups:
            learn_codes(task, matrices, adam(*groups), Schedule(self.epochs, self.tokens, self.seed))
