"""Static parameters of what attention multiplies, from a pass of the float model over the calibration windows."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.architectures.attention import Rounding, enable_rounded_attention, round_attention
from bitmill.calibration.streams import Streams
from bitmill.calibration.walk import walk_blocks
from bitmill.errors import NumericsError
from bitmill.formats import Params, ScalarFormat
from bitmill.formats.quantized import fit_matrix
from bitmill.formats.static_search import StaticFormat, search_static
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.attention import Attention

CALIBRATING = "calibrating attention"  # name of the task in the progress
_ROWS = 512  # tokens of a head that are kept of every batch


@torch.no_grad()
def calibrate_attention(
    streamed: StreamedModel, attention: Attention, windows: Tensor, progress: Progress | None = None
) -> Attention:
    """Find the static parameters of every block: of least squared error or, without a search, of the range.

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
    found: dict[str, list[Params]] = {site: [] for site in attention.static}
    for index, block in walk_blocks(streamed, progress):
        recorders = {site: Recorder() for site in found}
        round_attention(block, recorders)
        streams.hidden.advance(block, index)
        round_attention(block, {})
        for site, recorder in recorders.items():
            format = attention.static_format(site)
            found[site].append(static_parameters(format, recorder, f"the {site} of block {index}"))
    progress.finish()
    return attention.calibrated(found)


class Recorder(Rounding):
    """A rounding that changes nothing, and keeps some of the numbers and the range of all.

    Attributes:
        rows: kept numbers (rows, columns), batch by batch.
        low, high: of all numbers, () each; infinite before the first batch, NaN behind a NaN.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def __call__(self, numbers: Tensor) -> Tensor:
        """Record numbers (rows, columns), and return them."""
        self.rows.append(numbers[:: max(1, len(numbers) // _ROWS)].clone())
        low, high = numbers.aminmax()
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)
        return numbers


def static_parameters(format: ScalarFormat, recorded: Recorder, name: str) -> Params:
    """Return parameters of one group for all numbers.

    Args:
        format: of the numbers.
        recorded: some of them, and their range.
        name: of the numbers, as an error calls them.

    Raises:
        NumericsError: a number is NaN or Inf, or attention did not run.
    """
    both = torch.stack([recorded.low, recorded.high])[None]
    if not bool(torch.isfinite(both).all()):
        low, high = both[0].tolist()
        raise NumericsError(
            f"{name[0].upper()}{name[1:]} reach from {low:g} to {high:g} on the calibration text, which gives no "
            "scale; leave static out of attention, or calibrate on other text."
        )
    if not isinstance(format, StaticFormat):
        return fit_matrix(format, both, None, search=False)
    widest = max(rows.shape[1] for rows in recorded.rows)
    padded = [torch.nn.functional.pad(rows, (0, widest - rows.shape[1])) for rows in recorded.rows]
    return search_static(format, torch.cat(padded))
