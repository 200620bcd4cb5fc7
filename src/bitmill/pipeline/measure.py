"""Quality measured while quantizing: held-out windows travel through the float and the quantized blocks.

Both streams pass each block while it is in memory anyway, so even a model that does not fit is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.evaluation.judge import judge_of
from bitmill.models.calls import Call
from bitmill.models.pooling import pooling_of
from bitmill.models.skeleton import Skeleton
from bitmill.models.text import Windows


class Measure:
    """Float and quantized hidden states of held-out windows, one by one."""

    def __init__(self, skeleton: Skeleton, windows: Windows) -> None:
        self.skeleton, self.windows = skeleton, windows
        self.judge = judge_of(pooling_of(skeleton.source))
        self.float: list[Tensor] = []
        self.quantized: list[Tensor] = []
        self.calls: list[list[Call]] = []
        for window in windows:
            hidden, calls = skeleton.enter(window[None])
            self.float.append(hidden)
            self.quantized.append(hidden)
            self.calls.append(calls)

    def pass_float(self, block: nn.Module, index: int) -> None:
        """Send the float stream through a block that still holds its float weights."""
        self.float = [c[index].run(block, h) for c, h in zip(self.calls, self.float)]

    def pass_quantized(self, block: nn.Module, index: int) -> None:
        """Send the quantized stream through the block, now holding decoded weights."""
        self.quantized = [c[index].run(block, h) for c, h in zip(self.calls, self.quantized)]

    @torch.no_grad()
    def result(self) -> dict[str, Any]:
        """What the model's judge finds; needs the tensors outside the blocks in memory."""
        for window, reference, quantized in zip(self.windows, self.float, self.quantized):
            tokens = window[None]
            self.judge.add(tokens, self.skeleton.leave(tokens, quantized), self.skeleton.leave(tokens, reference))
        return self.judge.result()
