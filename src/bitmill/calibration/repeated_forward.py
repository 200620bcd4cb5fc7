"""The forward passes of a recurrent block, run anew for every stage.

Linear layers of a recurrent block run once for each token, on outputs that depend on themselves. Their inputs are
therefore known only at the end of a pass, with the weights that they have at that time, so that no single pass
can pause where they are ready (`StagedForward`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitmill.calibration.collect import recorded_inputs
from bitmill.calibration.staged_forward import StagedForward
from bitmill.models.block_call import BlockCall


class RepeatedForward:
    """The forward passes of all batches through one block, one for each stage; a context manager."""

    def __init__(self, block: nn.Module, batches: list[Tensor], calls: list[BlockCall], leads: list[str]) -> None:
        """Prepare the passes; nothing runs yet. See `StagedForward.__init__`; batches are left as they are."""
        self._block, self._batches, self._calls = block, batches, calls

    def __enter__(self) -> RepeatedForward:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: no hook and no thread outlives a call."""

    def inputs(self, lead: str) -> Iterator[Tensor]:
        """Run every batch, and yield the inputs of a stage.

        Args:
            lead: the first linear layer of the stage.

        Yields:
            X (tokens, in), batch by batch.
        """
        for call, hidden in zip(self._calls, self._batches):
            with recorded_inputs(self._block, [lead]) as recorded:
                call.run(self._block, hidden)
            yield torch.cat([X.reshape(-1, X.shape[-1]) for X in recorded[lead]])

    def outputs(self) -> list[Tensor]:
        """Run every batch, and return the hidden states after the block, batch by batch."""
        return [call.run(self._block, hidden) for call, hidden in zip(self._calls, self._batches)]


Forward = StagedForward | RepeatedForward


def stage_forward(recurrent: bool) -> type[Forward]:
    """Return the class that runs a block stage by stage.

    Args:
        recurrent: some linear layers of the block run once for each token.
    """
    return RepeatedForward if recurrent else StagedForward
