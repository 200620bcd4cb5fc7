"""A cell of a sweep: one format, and the results of rounding all layers with it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from bitmill.errors import NumericsError
from bitmill.evaluation.metrics import LanguageModelMetrics
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.grouping import GroupSize
from bitmill.solvers.base import squared_norm

Change = Callable[[StreamedModel], None]  # rounds one layer of the loaded block


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of a layer.

    Attributes:
        fitted: fp32 (tokens, columns), from which static scales come.
        measured: fp32 (tokens, columns), other tokens, on which errors are measured.
    """

    fitted: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Layer:
    """A linear layer of the block in memory.

    Attributes:
        name: full name.
        W: its weight, fp32 (out, in).
        inputs: its inputs in the float model; None where weights are swept.
    """

    name: str
    W: Tensor
    inputs: LayerInputs | None = None

    @cached_property
    def output_power(self) -> float:
        """Sum of squares of the outputs of the measured inputs."""
        assert self.inputs is not None
        return squared_norm(self.inputs.measured @ self.W.T)


@dataclass
class Cell(ABC):
    """One format, and the results of rounding with it.

    Attributes:
        name: name of the row of the table that the cell belongs to.
        bits: bits of a code.
        group_size: numbers that share a scale.
        errors: full name of a layer -> relative squared error.
        stored_bits: size of the numbers that were rounded.
        numbers: how many they are.
        metrics: comparison with the float model's predictions; empty without text.
    """

    of: ClassVar[str]  # "weight" or "input"
    error: ClassVar[str]  # key of the mean error

    name: str
    bits: int
    group_size: GroupSize
    errors: dict[str, float] = field(default_factory=dict, kw_only=True)
    stored_bits: int = field(default=0, kw_only=True)
    numbers: int = field(default=0, kw_only=True)
    metrics: LanguageModelMetrics = field(default_factory=LanguageModelMetrics, kw_only=True)

    @abstractmethod
    def round(self, layer: Layer) -> Change:
        """Round one layer, note its error and size, and return how the model is changed accordingly."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the names of the format as plain data."""

    def result(self) -> dict[str, Any]:
        """Return the cell as plain data."""
        worst = max(self.errors, key=lambda layer: self.errors[layer])
        mean = sum(self.errors.values()) / len(self.errors)
        measured: dict[str, float | int] = {}
        if self.metrics.predicted:
            try:
                measured = self.metrics.result()
            except NumericsError:  # this cell cannot be measured, and others can
                measured = {"kl_divergence": math.inf}
        return {
            **self.describe(),
            "name": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            f"bits_per_{self.of}": self.stored_bits / self.numbers,
            self.error: mean,
            "sqnr_db": decibels(mean),
            "worst_layer": worst,
            "worst_sqnr_db": decibels(self.errors[worst]),
            **{key: measured.get(key) for key in ("perplexity", "kl_divergence", "top1_agreement")},
        }


def decibels(error: float) -> float:
    """Return -10 log10(error); infinite without error."""
    return -10 * math.log10(error) if error > 0 else math.inf
