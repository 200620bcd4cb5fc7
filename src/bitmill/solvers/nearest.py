"""Round to nearest: fit the parameters, then take the closest storable number.

Data-free by default. `weighted` selects the weights of squared errors when parameters are fitted: "diagonal" the
mean square of the weight's input, "fisher" the loss's mean squared gradient by the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.numerics.statistics import WEIGHTED, Statistics
from bitmill.solvers.base import SOLVERS, Solver


@SOLVERS.register("nearest")
@dataclass(frozen=True)
class Nearest(Solver):
    """Nearest rounding; `search` looks for better parameters than the closed-form start."""

    search: bool = False
    weighted: Literal["nothing", "diagonal", "fisher"] = "nothing"

    @property
    def needs(self) -> frozenset[str]:
        """No statistics, unless errors are weighted."""
        return WEIGHTED[self.weighted]

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns).

        Raises:
            NumericsError: when the statistics that `weighted` needs were not collected.
        """
        importance = stats.importance(self.weighted, self.name)
        return nearest_matrix(format, W, fit_matrix(format, W, importance, self.search))
