"""Block fine-tuning: codes stay, everything continuous around them learns from the float block's outputs.

Trained are the fp16 parameters of every quantized layer of the block (scales, tables, codebooks: whatever the
format stores as numbers) and the norms and biases, by Adam on the mean squared distance to the float block.
After every epoch the parameters are rounded as they would be stored; the best of these states is kept, the
start included.

Source: AQLM (Egiazarian et al. 2024, arXiv 2401.06118), section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bitmill.errors import RecipeError
from bitmill.tuners.base import TUNERS, BlockTask, Tuner
from bitmill.tuners.training import Adam, Free, minibatches


@TUNERS.register("block_finetune")
@dataclass(frozen=True)
class BlockFinetune(Tuner):
    """Train what is continuous in a quantized block.

    epochs: passes over the calibration windows, at most.  patience: epochs without gain after which it stops.
    rate: of Adam, in units of the root mean square of each parameter's row; falls linearly to 0.
    tokens: in a step.  which: "norms" with biases, the quantized layers' "params", or "all".
    """

    epochs: int = 3
    rate: float = 1e-2
    tokens: int = 512
    patience: int = 1
    which: Literal["all", "norms", "params"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.tokens, self.patience) < 1 or not self.rate > 0:
            raise RecipeError(
                f"block_finetune has epochs {self.epochs}, tokens {self.tokens}, patience {self.patience} and "
                f"rate {self.rate}; use numbers above 0."
            )

    def after(self, task: BlockTask) -> None:
        """Train, and leave the block in the best state that can be stored."""
        free = Free(task, self.which != "norms", self.which != "params")
        start = best = task.error()
        if not free.leaves() or start == 0:
            return
        optimizer = Adam([leaf.steps for leaf in free.leaves()])
        generator = torch.Generator().manual_seed(self.seed)
        kept, idle, done = free.state(), 0, 0
        for _ in range(self.epochs):
            batches = list(minibatches(task, self.tokens, generator))
            for batch in batches:
                with torch.enable_grad():
                    output = batch.call.run_with(free.tensors(), task.block, batch.hidden)
                    ((output - batch.target).square().mean() / start).backward()
                optimizer.step(self.rate * (1 - done / (self.epochs * len(batches))))
                done += 1
            free.store()
            error = task.error()
            idle = 0 if error < best else idle + 1
            if error < best:
                best, kept = error, free.state()
            if idle == self.patience:
                break
        free.restore(kept)
