"""Static parameters of attention probabilities, from a pass of the float model over the calibration windows."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.architectures.attention import enable_rounded_attention, round_attention
from bitmill.calibration.streams import Streams
from bitmill.calibration.walk import walk_blocks
from bitmill.formats.static_search import StaticFormat, search_static
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.attention import Attention

CALIBRATING = "calibrating attention"  # name of the task in the progress
_ROWS = 512  # queries whose probabilities are kept of every batch


@torch.no_grad()
def calibrate_attention(
    streamed: StreamedModel, attention: Attention, windows: Tensor, progress: Progress | None = None
) -> Attention:
    """Search the parameters of every block's probabilities that round them with least squared error.

    Args:
        streamed: the float model; only one block is in memory at a time.
        attention: formats, with `static`.
        windows: token ids (windows, length), or pictures.
        progress: where progress is reported.

    Returns:
        The formats with their parameters.
    """
    progress = progress or Progress()
    enable_rounded_attention(streamed.model)
    with streamed.non_block_weights("embedding"):
        streams = Streams(streamed, windows, compare=False)
    progress.start(CALIBRATING, len(streamed.blocks))
    found = []
    for index, block in walk_blocks(streamed, progress):
        recorded: list[Tensor] = []

        def keep(probabilities: Tensor, recorded: list[Tensor] = recorded) -> Tensor:
            recorded.append(probabilities[:: max(1, len(probabilities) // _ROWS)].clone())
            return probabilities

        round_attention(block, {"probabilities": keep})
        streams.hidden.advance(block, index)
        round_attention(block, {})
        widest = max(rows.shape[1] for rows in recorded)
        padded = [torch.nn.functional.pad(rows, (0, widest - rows.shape[1])) for rows in recorded]
        assert isinstance(attention.static_format, StaticFormat)
        found.append(search_static(attention.static_format, torch.cat(padded)))
    progress.finish()
    return attention.calibrated(found)
