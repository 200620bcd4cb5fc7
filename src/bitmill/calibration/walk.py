"""The walk over the blocks of a model, one block in memory at a time, and the hidden states that pass them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress


def walk_blocks(
    streamed: StreamedModel, progress: Progress | None = None, reverse: bool = False
) -> Iterator[tuple[int, nn.Module]]:
    """Load every block in turn, yield it with its index, and free it when the next one is requested.

    Args:
        streamed: model that supplies the blocks, with float weights in fp32.
        progress: advanced by one for each block.
        reverse: from the last block to the first.
    """
    order = range(len(streamed.blocks))
    for index in reversed(order) if reverse else order:
        yield index, streamed.load_block(index)
        streamed.free_block(index)
        if progress:
            progress.advance()


class HiddenStates:
    """Hidden states of token windows before the next block of the walk.

    Attributes:
        batches: fp32 (windows, tokens, width), batch by batch.
    """

    def __init__(self, streamed: StreamedModel, batches: Sequence[Tensor]) -> None:
        """Embed token windows; needs the weights of the side "embedding" in memory.

        Args:
            streamed: model that embeds them.
            batches: token ids (windows, tokens), batch by batch.
        """
        self._streamed, self._tokens = streamed, batches
        self._calls: list[list[BlockCall]] = []
        self._put_embedding: Callable[[], None] | None = None
        self.embed()

    def embed(self, put_embedding: Callable[[], None] | None = None) -> None:
        """Start again with the embeddings that are in memory now.

        Args:
            put_embedding: puts these embeddings in memory again, for a decoder that follows an encoder; None for
                those of the source.
        """
        self._put_embedding = put_embedding
        embedded = [self._streamed.embed(tokens) for tokens in self._tokens]
        self.batches = [hidden for hidden, _ in embedded]
        self._calls[:] = [calls for _, calls in embedded]  # in place: forks share the list

    def fork(self) -> HiddenStates:
        """Return a second stream that starts with these hidden states; both share how blocks are called."""
        other = object.__new__(HiddenStates)
        vars(other).update(vars(self), batches=list(self.batches))
        return other

    def calls(self, index: int) -> list[BlockCall]:
        """Return how the model calls block `index`, batch by batch."""
        return [calls[index] for calls in self._calls]

    @torch.no_grad()
    def forward(self, block: nn.Module, index: int) -> list[Tensor]:
        """Return the outputs of a block with its current weights, batch by batch."""
        return [call.run(block, hidden) for call, hidden in zip(self.calls(index), self.batches)]

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Move past a block with its current weights."""
        for number, call in enumerate(self.calls(index)):  # one by one, so that inputs are freed as they pass
            self.batches[number] = call.run(block, self.batches[number])
            self._streamed.note_hidden_states(self.batches[number])
        self._enter(index + 1)

    def follow(self, outputs: list[Tensor], index: int) -> None:
        """Move past a block whose outputs are available, batch by batch."""
        self.batches = outputs
        self._enter(index + 1)

    @torch.no_grad()
    def _enter(self, index: int) -> None:
        """Go on with the inputs of a decoder, where an encoder ended before block `index`."""
        if not self._streamed.starts_stack(index):
            return
        with self._streamed.non_block_weights("embedding"):
            if self._put_embedding:
                self._put_embedding()
            entered = [
                self._streamed.enter(index, tokens, hidden) for tokens, hidden in zip(self._tokens, self.batches)
            ]
        self.batches = [hidden for hidden, _ in entered]
        # other lists than those of forks, whose encoder gave other outputs
        self._calls = [[*calls[:index], *later] for calls, (_, later) in zip(self._calls, entered)]
