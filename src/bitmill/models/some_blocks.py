"""A view of a streamed model with some of its blocks, to try work on a part of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel


class SomeBlocks(StreamedModel):
    """A streamed model that runs some of its blocks, under their own names.

    The modules are those of the whole model, whose other blocks stay as they are.
    """

    def __init__(self, streamed: StreamedModel, indices: Sequence[int]) -> None:
        """Make a view.

        Args:
            streamed: the whole model.
            indices: of the blocks, in the order in which they run.

        Raises:
            SourceError: the blocks are those of an encoder and a decoder.
        """
        if len(streamed.stacks.starts) > 1:
            raise SourceError(f"{streamed.source.name} has an encoder and a decoder, which run as a whole alone.")
        vars(self).update(vars(streamed))
        self._whole, self._indices = streamed, tuple(indices)
        self.blocks = nn.ModuleList([streamed.blocks[index] for index in indices])

    def block_name(self, index: int) -> str:
        """Return the full name of a block of the view."""
        return self._whole.block_name(self._indices[index])

    def non_block_tensors(self) -> list[str]:
        """Return the names of the stored tensors outside all blocks of the model."""
        return self._whole.non_block_tensors()
