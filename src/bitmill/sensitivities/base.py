"""The contract of a sensitivity: a cost for every candidate format of every unit of a model.

Units are quantized one at a time, with the float model around them; costs of several units are added up. A
sensitivity is a frozen dataclass of options; `begin` makes the passes over the whole model that it needs and
returns a meter, which receives the quantized weights of one block after another.

Laws (tests/conformance/test_sensitivities.py): costs are finite and not negative; weights that do not change cost
nothing; a block that is skipped changes no cost of later ones; a repeated measurement gives equal costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from bitmill.config.registry import Member, Registry
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import Statistics
from bitmill.progress import Progress
from bitmill.solvers.base import output_error

SENSITIVITIES: Registry[type[Sensitivity]] = Registry("sensitivity", "bitmill.sensitivities")


@dataclass(frozen=True)
class Run:
    """Data that a sensitivity is measured with.

    Attributes:
        streamed: the float model.
        windows: token ids (windows, length) of the calibration text.
        folder: for files that later runs on these windows may use.
        progress: where progress is reported.
    """

    streamed: StreamedModel
    windows: Tensor
    folder: Path
    progress: Progress


@dataclass(frozen=True)
class LoadedBlock:
    """A block in memory, with float weights.

    Attributes:
        index: its index.
        module: the block.
        stats: path of a linear -> statistics of its inputs in the float model.
    """

    index: int
    module: nn.Module
    stats: Mapping[str, Statistics]


@dataclass(frozen=True)
class Change:
    """Quantized weights of one unit.

    Attributes:
        weights: path of a linear in its block -> decoded weight, fp32 (out, in).
        floats: path -> float weight, fp32 (out, in).
    """

    weights: Mapping[str, Tensor]
    floats: Mapping[str, Tensor]

    def output_error(self, stats: Mapping[str, Statistics]) -> float:
        """Return the sum over layers of the relative squared errors of their outputs."""
        return sum(output_error(self.floats[path], W, stats[path].gram) for path, W in self.weights.items())

    def weight_error(self) -> float:
        """Return the sum over layers of the relative squared errors of their weights."""
        return sum(output_error(self.floats[path], W, None) for path, W in self.weights.items())


class Meter(ABC):
    """Measures the changes of one block after another, in order; blocks without changes are passed too."""

    @abstractmethod
    def add(self, block: LoadedBlock, change: Change) -> None:
        """Take a change of the block, whose tensors are freed afterwards."""

    @abstractmethod
    def finish(self, block: LoadedBlock) -> list[float]:
        """Return the costs of the changes since the last block, in their order, and move past the block."""


class LocalMeter(Meter):
    """A meter whose costs follow from the change and the statistics of its block alone."""

    def __init__(self) -> None:
        self._costs: list[float] = []

    @abstractmethod
    def cost(self, block: LoadedBlock, change: Change) -> float:
        """Return the cost of a change."""

    def add(self, block: LoadedBlock, change: Change) -> None:
        """Compute and keep the cost of a change."""
        self._costs.append(max(self.cost(block, change), 0.0))

    def finish(self, block: LoadedBlock) -> list[float]:
        """Return the costs."""
        costs, self._costs = self._costs, []
        return costs


@dataclass(frozen=True)
class Sensitivity(Member, ABC):
    """Base of all sensitivities: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Sensitivity]]] = SENSITIVITIES
    in_nats: ClassVar[bool] = True  # costs estimate the KL divergence; others are scaled to a measured one

    def prepare(self, run: Run) -> None:
        """Make the passes whose results the folder of the run keeps; `begin` calls it."""

    @abstractmethod
    def begin(self, run: Run) -> Meter:
        """Return a meter, after the passes over the whole model that it needs."""
