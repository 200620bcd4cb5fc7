"""First-order change of the loss."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file
from torch import Tensor

from bitmill.calibration.gradients import walk_gradients
from bitmill.files import write_tensors
from bitmill.sensitivities.base import SENSITIVITIES, Change, LoadedBlock, LocalMeter, Meter, Run, Sensitivity


@SENSITIVITIES.register("taylor")
@dataclass(frozen=True)
class Taylor(Sensitivity):
    """|sum_ij g_ij D_ij|,  D = W - W^,  g the gradient of the mean loss over the windows.

    Cost       about five forward passes over the windows
    Paper      LLM-MQ (Li et al. 2023)

    Attributes:
        windows: calibration windows.
    """

    in_nats: ClassVar[bool] = False

    windows: int = 16

    def begin(self, run: Run) -> Meter:
        """Write the mean gradient of every block into a temporary folder."""
        windows, folder = run.windows[: self.windows], tempfile.TemporaryDirectory(prefix="bitmill-")
        run.progress.start("gradients", 2 * len(run.streamed.blocks))
        passes = walk_gradients(run.streamed, windows, Path(folder.name), run.progress, add_gradient)
        for index, gradients in passes:
            mean = {name: gradient.div_(len(windows)) for name, gradient in gradients.items()}
            write_tensors(Path(folder.name) / f"{index}.safetensors", mean, sync=False)
        return _Meter(folder)


def add_gradient(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Return the sum of gradients."""
    return gradient if total is None else total.add_(gradient)


class _Meter(LocalMeter):
    def __init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__()
        self._folder = folder  # is removed with the meter
        self._of: tuple[int, dict[str, Tensor]] = (-1, {})

    def cost(self, block: LoadedBlock, change: Change) -> float:
        """Return the magnitude of the first-order change."""
        if self._of[0] != block.index:
            self._of = (block.index, load_file(Path(self._folder.name) / f"{block.index}.safetensors"))
        products = (
            ((W - change.floats[path]) * self._of[1][path].to(W.device)).sum()
            for path, W in change.weights.items()
        )
        return abs(float(sum(products)))
