"""The calibration windows on their way through the blocks.

Up to two streams travel: what the quantized blocks make of the text, which is what later blocks will have to
live with, and what the float model has there, for those who compare with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel

# Windows are batched up to this many tokens: enough for large products, little enough for small memory.
BATCH_TOKENS = 2048


class Streams:
    """Hidden states before the next block, (windows, tokens, width) batch by batch.

    hidden: what blocks are calibrated on.  float: the float model's, None when nobody compares.
    """

    def __init__(self, streamed: StreamedModel, windows: Tensor, compare: bool) -> None:
        self._streamed = streamed
        self._batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
        self.embed_windows()
        self.float: list[Tensor] | None = list(self.hidden) if compare else None

    def embed_windows(self) -> None:
        """Begin with the embeddings that are in memory now; the float stream stays where it is."""
        self.hidden: list[Tensor] = []
        self._calls: list[list[BlockCall]] = []
        for batch in self._batches:
            start, calls = self._streamed.embed(batch)
            self.hidden.append(start)
            self._calls.append(calls)

    def calls(self, index: int) -> list[BlockCall]:
        """How block `index` is called, batch by batch."""
        return [calls[index] for calls in self._calls]

    def float_outputs(self, block: nn.Module, index: int) -> list[Tensor]:
        """What a block that still holds its float weights makes of the float stream; empty without one."""
        return [] if self.float is None else self.forward(block, index, self.float)

    def advance(
        self,
        block: nn.Module,
        index: int,
        targets: list[Tensor],
        outputs: list[Tensor] | None = None,
        follow_float: bool = False,
    ) -> None:
        """Move on to the next block.

        targets: as `float_outputs` gave them.  outputs: of the quantized block on `hidden`, where they are known.
        follow_float: calibrate the next block on the float model's hidden states.
        """
        if follow_float:
            self.hidden = targets
        else:
            self.hidden = self.forward(block, index, self.hidden) if outputs is None else outputs
        self.float = None if self.float is None else targets

    @torch.no_grad()
    def forward(self, block: nn.Module, index: int, batches: list[Tensor]) -> list[Tensor]:
        """What block `index` makes of hidden states, with whatever its weights are now."""
        return [call.run(block, hidden) for call, hidden in zip(self.calls(index), batches)]
