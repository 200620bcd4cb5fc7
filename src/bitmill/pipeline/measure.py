"""Quality measured while quantizing: held-out windows travel through the float and the quantized blocks.

Both streams pass each block while it is in memory anyway, so even a model that does not fit is measured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.data.text import Windows
from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.embeddings import QuantizedEmbeddings


class HeldOutMetrics:
    """Float and quantized hidden states of held-out windows, one by one."""

    def __init__(self, streamed: StreamedModel, windows: Windows) -> None:
        self.streamed, self.windows = streamed, windows
        self.metric = streamed.task.metric()
        self.embed_windows()
        self.float = list(self.quantized)

    def embed_windows(self) -> None:
        """Begin the quantized stream with the embeddings that are in memory now."""
        self.quantized: list[Tensor] = []
        self.calls: list[list[BlockCall]] = []
        for window in self.windows:
            hidden, calls = self.streamed.embed(window[None])
            self.quantized.append(hidden)
            self.calls.append(calls)

    def advance_float(self, block: nn.Module, index: int) -> None:
        """Send the float stream through a block that still holds its float weights."""
        self.float = [c[index].run(block, h) for c, h in zip(self.calls, self.float)]

    def advance_quantized(self, block: nn.Module, index: int) -> None:
        """Send the quantized stream through the block, now holding decoded weights."""
        self.quantized = [c[index].run(block, h) for c, h in zip(self.calls, self.quantized)]

    @torch.no_grad()
    def result(self, ends: QuantizedEmbeddings | None = None) -> dict[str, Any]:
        """What the model's metric finds; needs the tensors outside the blocks in memory.

        ends: with the head through which the quantized stream leaves, where that is another than the float one.
        """
        for window, reference, quantized in zip(self.windows, self.float, self.quantized):
            tokens = window[None]
            with ends.head() if ends else nullcontext():
                answer = self.streamed.head(tokens, quantized)
            self.metric.add(tokens, answer, self.streamed.head(tokens, reference))
        return self.metric.result()
