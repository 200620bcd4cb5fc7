"""KL divergence of the final logits when one unit alone is replaced."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.sensitivities.base import SENSITIVITIES, Change, LoadedBlock, Meter, Run, Sensitivity
from bitmill.sensitivities.divergence import Divergences


@SENSITIVITIES.register("kl")
@dataclass(frozen=True)
class KL(Sensitivity):
    """The divergence itself, measured for every candidate of every unit.

    Cost       one pass through the later blocks for every candidate of every unit

    Attributes:
        windows: calibration windows.
        tokens: first tokens of each.
    """

    windows: int = 4
    tokens: int = 256

    def begin(self, run: Run) -> Meter:
        """Let the windows pass the float model."""
        return _Meter(Divergences(run.streamed, run.windows[: self.windows, : self.tokens]))


class _Meter(Meter):
    def __init__(self, divergences: Divergences) -> None:
        self._divergences = divergences

    def add(self, block: LoadedBlock, change: Change) -> None:
        """Let the windows pass the changed block."""
        self._divergences.add(block, dict(change.weights))

    def finish(self, block: LoadedBlock) -> list[float]:
        """Let all streams pass the later blocks, and compare their logits."""
        return self._divergences.finish(block)
