"""Norm tweaking: norms learn to give a quantized block the output distribution of the float one.

    loss = 1/C sum_c (|mean_f,c - mean_q,c| + |var_f,c - var_q,c|)      over tokens, channel by channel

One pass over the calibration windows, Adam on the weights and biases of norms alone; the learning
rate grows with depth, because errors do. Hidden states are in units of the float token's root mean
square, or an attention sink would be all of the variance. A block's norms stay unchanged unless both the
loss and the tokens' own distance from the float block's outputs fell.

Source: Norm Tweaking (Li et al. 2023, arXiv 2309.02784), algorithm 1 and equations 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.tuners.base import TUNERS, BlockTask, Tuner, mean_square, relative_error
from bitmill.tuners.training import TrainableParameters, adam, adam_step, minibatches


@TUNERS.register("norm_tweaking")
@dataclass(frozen=True)
class NormTweaking(Tuner):
    """Train norms on the distribution of the block's outputs.

    rate: of Adam in the first block, in units of the root mean square of each vector.
    growth: the last block's rate is about (1 + growth) times the first one's.  tokens: in a step.
    """

    rate: float = 1e-3
    growth: float = 1.0
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 0 or self.growth < 0 or self.tokens < 1:
            raise RecipeError(
                f"norm_tweaking has rate {self.rate}, growth {self.growth} and tokens {self.tokens}; use a rate "
                "and tokens above 0 and a growth of at least 0."
            )

    def after(self, task: BlockTask) -> None:
        """Run one pass of Adam over the windows."""
        free = TrainableParameters(task, params=False, norms=True)
        if not free.leaves():
            return
        rate = self.rate * (1 + self.growth * task.index / task.depth)
        optimizer = adam(([leaf.steps for leaf in free.leaves()], rate))
        start, before = free.state(), self.losses(task)
        generator = torch.Generator().manual_seed(self.seed)
        for batch in minibatches(task, self.tokens, generator):
            with torch.enable_grad():
                output = batch.call.run_with(free.tensors(), task.block, batch.hidden)
                distance(moments([output], [batch.target]), moments([batch.target])).backward()
            adam_step(optimizer)
        free.store()
        if not all(now < then for now, then in zip(self.losses(task), before)):
            free.restore(start)

    @torch.no_grad()
    def losses(self, task: BlockTask) -> tuple[float, float]:
        """Return the distances from the float block's outputs: of the distributions, and token by token."""
        outputs = [task.run(i) for i in range(len(task.inputs))]
        apart = distance(moments(outputs, task.targets), moments(task.targets))
        return float(apart), float(
            torch.cat([relative_error(*pair).flatten() for pair in zip(outputs, task.targets)]).mean()
        )


def moments(batches: list[Tensor], targets: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and variance over tokens, in units of each token's root mean square.

    Args:
        batches: hidden states (windows, tokens, channels).
        targets: whose root mean squares are the units; those of `batches` without them.

    Returns:
        Two tensors (channels,).
    """
    units = [mean_square(target).sqrt()[..., None] for target in targets or batches]
    rows = torch.cat([(batch / unit).flatten(0, 1) for batch, unit in zip(batches, units)])
    return rows.mean(0), rows.var(0, correction=0)


def distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of two pairs of mean and variance.

    Args:
        first, second: (mean, variance), (channels,) each.
    """
    return (first[0] - second[0]).abs().mean() + (first[1] - second[1]).abs().mean()
