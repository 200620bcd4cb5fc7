"""Relative squared error of the outputs of a layer, after its solver has compensated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitmill.sensitivities.base import SENSITIVITIES, Change, LoadedBlock, LocalMeter, Meter, Run, Sensitivity


@SENSITIVITIES.register("output_error")
@dataclass(frozen=True)
class OutputError(Sensitivity):
    """tr(D G D^T) / tr(W G W^T),  D = W - W^,  G the Gram matrix of the inputs; the sum over the layers of a unit.

    W^ are the weights that the candidate's solver returns, so that GPTQ's compensation counts. Nothing says how
    much the rest of the model suffers from an error of a layer: all layers count alike.
    """

    in_nats: ClassVar[bool] = False

    def begin(self, run: Run) -> Meter:
        """Return a meter; no pass is needed."""
        return _Meter()


class _Meter(LocalMeter):
    def cost(self, block: LoadedBlock, change: Change) -> float:
        """Return the sum of the layers' errors."""
        return change.output_error(block.stats)
