"""Squared perturbation weighted by the Fisher diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitmill.calibration.fisher import Fisher
from bitmill.sensitivities.base import SENSITIVITIES, Change, LoadedBlock, LocalMeter, Meter, Run, Sensitivity


@SENSITIVITIES.register("fisher")
@dataclass(frozen=True)
class FisherDiagonal(Sensitivity):
    """1/2 T sum_ij F_ij D_ij^2,  D = W - W^,  T tokens of a window.

    F is the mean over windows of the squared gradient of the window's mean loss. Gradients of single tokens are
    taken for independent, so that T F is the mean squared gradient of a token, whose half weighs D^2 in the second
    order of the KL divergence.

    Cost       about five forward passes over the windows

    Attributes:
        windows: calibration windows.
    """

    windows: int = 16

    def prepare(self, run: Run) -> None:
        """Measure the Fisher diagonal, unless an earlier run did."""
        fisher, windows = self._fisher(run)
        if not fisher.complete:
            fisher.measure(run.streamed, windows, run.progress)

    def begin(self, run: Run) -> Meter:
        """Measure the Fisher diagonal, unless an earlier run did."""
        self.prepare(run)
        fisher, windows = self._fisher(run)
        return _Meter(fisher, windows.shape[1])

    def _fisher(self, run: Run) -> tuple[Fisher, Tensor]:
        windows = run.windows[: self.windows]
        return Fisher(run.folder / f"fisher-{len(windows)}"), windows


class _Meter(LocalMeter):
    def __init__(self, fisher: Fisher, tokens: int) -> None:
        super().__init__()
        self._fisher, self._tokens = fisher, tokens
        self._of: tuple[int, dict[str, Tensor]] = (-1, {})

    def cost(self, block: LoadedBlock, change: Change) -> float:
        """Return the weighted square of the change."""
        if self._of[0] != block.index:
            self._of = (block.index, self._fisher.block(block.index))
        total = 0.0
        for path, W in change.weights.items():
            D = W - change.floats[path]
            total += float((D.square_() * self._of[1][path].to(D.device)).sum())
        return 0.5 * self._tokens * total
