"""The Fisher diagonal: the sensitivity of the model's own loss to each single weight.

    F = mean over windows of (d loss / d W)^2        loss: mean next-token cross entropy of one window;
                                                     of an encoder u e, e its embedding, u drawn from N(0, I)

One backward pass per window, block by block, see `bitmill.calibration.gradients`. Squares are summed in fp32 (a
weight's square is of the order of 1e-10, which half types round to zero); results are written to disk, so memory
does not grow with depth.

The gradient is averaged over a window's tokens before it is squared, as in SqueezeLLM (arXiv 2306.07629,
section 4.1 and its published gradient code), so this is no Fisher matrix of single tokens. An encoder has no
tokens to predict; the mean over u of (d u e / d W)^2 is |d e / d W|^2, how far a small change of W moves the
embedding, which is the Fisher diagonal of a model that answers e and noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bitmill.calibration.experts import fill_idle_experts
from bitmill.calibration.gradients import walk_gradients
from bitmill.errors import CalibrationError, one_line
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recorded_tensors import read_recorded, write_recorded

_META = "bitmill_fisher"
_UNRECORDED = ("format",)  # metadata of earlier versions
WINDOWS = 100  # most windows that are read; the published figures use 100


class Fisher:
    """The Fisher diagonal of every linear of every block, kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(self, index: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return F, fp32 (out, in), of every linear of a block, by its path in the block.

        Raises:
            CalibrationError: the file is damaged.
        """
        path = self._file(index)
        try:
            squares, _ = read_recorded(path, _META, _UNRECORDED)
            return {name: square.to(device) for name, square in squares.items()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"The squared gradients in {path} cannot be read ({one_line(error)}); delete {self.folder}."
            ) from None

    @property
    def complete(self) -> bool:
        """Return True if all blocks are there: the first block's file is written last."""
        return self._file(0).exists()

    def measure(self, streamed: StreamedModel, windows: Tensor, progress: Progress) -> None:
        """Fill the folder.

        Args:
            streamed: the float model.
            windows: token ids (windows, length), of which the first WINDOWS are used.
            progress: advanced by two for each block.

        Raises:
            NumericsError: If the model's loss is NaN or Inf.
            OutputError: If the folder has too little space.
        """
        windows = windows[:WINDOWS]
        progress.start("Fisher information", 2 * len(streamed.blocks))
        for index, squares in walk_gradients(streamed, windows, self.folder, progress, _add_square):
            mean = {name: square.div_(len(windows)) for name, square in squares.items()}
            write_recorded(
                self._file(index), _META, fill_idle_experts(mean), {"windows": len(windows)}, shared=True
            )

    def _file(self, index: int) -> Path:
        return self.folder / f"fisher-{index:05d}.safetensors"


def rescale_fisher(F: Tensor, W: Tensor, scaled: Tensor) -> Tensor:
    """Return the Fisher diagonal of a weight whose rows or columns were scaled.

    Args:
        F: Fisher diagonal of W, (out, in).
        W: the weight before, (out, in).
        scaled: the weight after; its gradients are those of W divided by the scales.
    """
    return F * torch.where(scaled != 0, W / scaled, 1.0).square_()


def _add_square(total: Tensor | None, gradient: Tensor) -> Tensor:
    square = gradient.square_()
    return square if total is None else total.add_(square)
