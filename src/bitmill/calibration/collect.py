"""What the linears of a block read, seen in one forward pass of the block as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.models.block_call import BlockCall
from bitmill.numerics.gram import RunningGram
from bitmill.numerics.statistics import Statistics


class _Watch:
    """Running statistics of one tensor, X (tokens, channels)."""

    def __init__(self) -> None:
        self.gram: RunningGram | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        X = args[0].reshape(-1, args[0].shape[-1]).to(torch.float32)
        if self.gram is None:
            self.gram = RunningGram(X.shape[1], X.device)
            self.sum_abs, self.max_abs = torch.zeros_like(X[0]), torch.zeros_like(X[0])
        self.gram.add(X)
        size = X.abs()
        self.sum_abs += size.sum(0)
        torch.maximum(self.max_abs, size.amax(0), out=self.max_abs)

    def result(self) -> Statistics:
        assert self.gram is not None
        tokens = self.gram.tokens
        return Statistics(self.gram.mean(), tokens, mean_abs=self.sum_abs / max(tokens, 1), max_abs=self.max_abs)


@torch.no_grad()
def collect_statistics(
    block: nn.Module, batches: list[Tensor], calls: list[BlockCall], leads: list[str]
) -> dict[str, Statistics]:
    """Statistics of what each of the linears `leads` reads."""
    watches = {name: _Watch() for name in leads}
    hooks = [block.get_submodule(name).register_forward_pre_hook(watch.hook) for name, watch in watches.items()]
    try:
        for call, hidden in zip(calls, batches):
            call.run(block, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: watch.result() for name, watch in watches.items()}
