"""Gradients of the model's loss by the outputs of its blocks: what the loss sees of an error there.

    loss(z + e) - loss(z) is about e F e / 2,    F = mean of g g^T over draws of the loss

g is the gradient of one draw by the output z of a block for one window: of the task's loss, which for features
and logits is a random projection whose squared gradient has the Fisher information as its mean (see
`bitmill.tasks.image`). A draw costs a forward and a backward pass of the float model.

Source: the connection of Fisher information and block outputs in FIMA-Q (Wu et al. 2025, arXiv 2506.11543),
section 3. There g is the gradient of the divergence at the quantized block's outputs; here that of a random
projection at the float block's, which needs one pass for all blocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bitmill.calibration.gradients import walk_gradients
from bitmill.errors import CalibrationError, one_line
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recorded_tensors import read_recorded, write_recorded

_META = "bitmill_output_gradients"
_LARGEST = 60_000.0  # in fp16


class OutputGradients:
    """Gradients by the outputs of every block, kept in `folder` in fp16 with a mean square of 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def complete(self) -> bool:
        """Return True if all blocks are there: the first block's file is written last."""
        return self._file(0).exists()

    def block(self, index: int, batches: list[Tensor]) -> list[Tensor]:
        """Return the gradients of a block, fp32 (draws, windows, tokens, width), batch by batch.

        Args:
            index: the block.
            batches: hidden states (windows, tokens, width) of the calibration.

        Raises:
            CalibrationError: the file is damaged.
        """
        try:
            tensors, _ = read_recorded(self._file(index), _META, ())
            stored = tensors["gradients"].view(-1, sum(map(len, batches)), *tensors["gradients"].shape[1:])
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise CalibrationError(
                f"The gradients in {self._file(index)} cannot be read ({one_line(error)}); delete {self.folder}."
            ) from None
        parts = stored.split([len(batch) for batch in batches], 1)
        return [part.to(batch.device, torch.float32) for part, batch in zip(parts, batches)]

    def measure(self, streamed: StreamedModel, windows: Tensor, draws: int, progress: Progress) -> None:
        """Fill the folder.

        Args:
            streamed: the float model.
            windows: token ids (windows, length), or pictures.
            draws: of the loss for each window.
            progress: advanced by two for each block.

        Raises:
            NumericsError: the model's loss is NaN or Inf.
            OutputError: the folder has too little space.
        """
        progress.start("gradients of outputs", 2 * len(streamed.blocks))
        repeated = windows.repeat(draws, *[1] * (windows.dim() - 1))
        for _ in walk_gradients(streamed, repeated, self.folder, progress, None, observe=self._write):
            pass
        progress.finish()

    def _write(self, index: int, gradients: list[Tensor]) -> None:
        joined = torch.cat(gradients).float()
        joined /= joined.square().mean().sqrt().clamp(min=1e-30)
        half = joined.clamp_(-_LARGEST, _LARGEST).half().cpu()
        write_recorded(self._file(index), _META, {"gradients": half}, {"windows": len(half)}, shared=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"output-gradients-{index:05d}.safetensors"
