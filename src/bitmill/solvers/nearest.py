"""Round to nearest: fit the parameters, then take the closest storable number.

Data-free by default. With `weighted`, errors count by the mean square of their input.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.solvers.base import GRAM, NOTHING, SOLVERS, Solver, Statistics


@SOLVERS.register("nearest")
@dataclass(frozen=True)
class Nearest(Solver):
    """Nearest rounding; `search` looks for better parameters than the closed-form start."""

    search: bool = False
    weighted: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Nothing, unless errors are weighted."""
        return GRAM if self.weighted else NOTHING

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns)."""
        importance = stats.required_gram(self.name).diagonal() if self.weighted else None
        return nearest_matrix(format, W, fit_matrix(format, W, importance, self.search))
