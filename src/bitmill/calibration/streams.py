"""The hidden states of the calibration windows on their way through the blocks, in up to two streams.

One stream has passed the quantized blocks, since later blocks will receive their outputs; the other one has passed
the float blocks, for methods that compare the two.
"""

from __future__ import annotations

from torch import Tensor, nn

from bitmill.calibration.walk import HiddenStates
from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel

# Windows are batched up to this many tokens: enough for large products, little enough for small memory.
BATCH_TOKENS = 2048


class Streams:
    """Hidden states of the calibration windows before the next block.

    Attributes:
        hidden: input of the next block during calibration.
        float: hidden states of the float model; None where no method compares with them.
    """

    def __init__(self, streamed: StreamedModel, windows: Tensor, compare: bool) -> None:
        """Embed the windows; needs the weights of the side "embedding" in memory.

        Args:
            streamed: the float model.
            windows: token ids (windows, length), or windows of another kind.
            compare: keep the float model's hidden states too.
        """
        self._streamed = streamed
        batches = windows.split(max(1, BATCH_TOKENS // streamed.task.positions(windows)))
        self.hidden = HiddenStates(streamed, batches)
        self.float: HiddenStates | None = self.hidden.fork() if compare else None

    def calls(self, index: int) -> list[BlockCall]:
        """Return how the model calls block `index`, batch by batch."""
        return self.hidden.calls(index)

    def first_window(self, index: int) -> tuple[Tensor, BlockCall]:
        """Return the hidden states (1, tokens, width) of the first window, and how it is passed to a block."""
        first = self.hidden.batches[0]
        return first[:1], self.calls(index)[0].cut(first.shape[0], 0, 1)

    def float_outputs(self, block: nn.Module, index: int) -> list[Tensor]:
        """Return the outputs of a float block on the float stream, batch by batch; empty without that stream."""
        return [] if self.float is None else self.float.forward(block, index)

    def advance(
        self,
        block: nn.Module,
        index: int,
        float_outputs: list[Tensor],
        outputs: list[Tensor] | None = None,
        follow_float: bool = False,
    ) -> None:
        """Move past a block.

        Args:
            block: the quantized block.
            index: its index.
            float_outputs: result of `float_outputs` while the block held float weights.
            outputs: outputs of the quantized block on `hidden`, where they are available.
            follow_float: calibrate the next block on the float model's hidden states.
        """
        followed = float_outputs if follow_float else outputs
        if followed is None:
            self.hidden.advance(block, index)
        else:
            self.hidden.follow(followed, index)
            self._streamed.note_hidden_states(*followed)
        if self.float:
            self.float.follow(float_outputs, index)
