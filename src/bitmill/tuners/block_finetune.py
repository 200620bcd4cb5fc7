"""Block fine-tuning: codes stay, and all continuous parameters learn from the float block's outputs.

Trained are the fp16 parameters of every quantized layer of the block (scales, tables, codebooks: all that the
format stores as numbers) and the norms and biases, by Adam on the distance to the float block, in which every
token has equal weight. After every epoch the parameters are rounded to their stored form; the best of these states
is kept, the start included, and after an epoch without gain training restarts from it at half the rate.

Source: AQLM (Egiazarian et al. 2024, arXiv 2401.06118), section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bitmill.errors import RecipeError
from bitmill.tuners.base import TUNERS, BlockTask, Tuner, relative_error
from bitmill.tuners.training import TrainableParameters, adam, adam_step, minibatches


@TUNERS.register("block_finetune")
@dataclass(frozen=True)
class BlockFinetune(Tuner):
    """Train the continuous parameters of a quantized block.

    epochs: passes over the calibration windows.  tokens: in a step.
    rate: of Adam, in units of the root mean square of each parameter's row; falls linearly to 0.
    which: "norms" with biases, the quantized layers' "params", or "all".
    """

    epochs: int = 3
    rate: float = 3e-3
    tokens: int = 512
    which: Literal["all", "norms", "params"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.tokens) < 1 or not self.rate > 0:
            raise RecipeError(
                f"block_finetune has epochs {self.epochs}, tokens {self.tokens} and rate {self.rate}; use numbers "
                "above 0."
            )

    def after(self, task: BlockTask) -> None:
        """Train, and leave the block in the best state that can be stored."""
        free = TrainableParameters(task, self.which != "norms", self.which != "params")
        start = best = task.error()
        if not free.leaves() or start == 0:
            return
        generator = torch.Generator().manual_seed(self.seed)
        kept, rate = free.state(), self.rate
        for epoch in range(self.epochs):
            optimizer = adam(([leaf.steps for leaf in free.leaves()], rate))
            batches = list(minibatches(task, self.tokens, generator))
            for step, batch in enumerate(batches):
                with torch.enable_grad():
                    output = batch.call.run_with(free.tensors(), task.block, batch.hidden)
                    (relative_error(output, batch.target).mean() / start).backward()
                adam_step(optimizer, 1 - (epoch + step / len(batches)) / self.epochs)
            free.store()
            error = task.error()
            if error < best:
                best, kept = error, free.state()
            else:
                free.restore(kept)
                rate /= 2
        free.restore(kept)
