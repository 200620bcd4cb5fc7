"""Alternating least squares: nearest codes, best parameters for these codes, and so on.

Lowers the weight error of any format that can refit its parameters; data-free, or `weighted` as in `nearest`.

Source: Xu et al. 2018 (arXiv 1802.00150), section 4, for binary coding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat
from bitmill.formats.fitting import alternate
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.numerics.grouping import grouped, grouped_importance
from bitmill.numerics.statistics import WEIGHTED, Statistics
from bitmill.solvers.base import SOLVERS, Solver


@SOLVERS.register("alternating")
@dataclass(frozen=True)
class Alternating(Solver):
    """Up to `rounds` alternations from the format's closed-form start."""

    rounds: int = 15
    weighted: Literal["nothing", "diagonal", "fisher"] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise RecipeError(f"rounds is {self.rounds!r}; use 0 or more.")

    @property
    def needs(self) -> frozenset[str]:
        """No statistics, unless errors are weighted."""
        return WEIGHTED[self.weighted]

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return a reason for formats whose rows share codebooks: slices of rows are solved independently."""
        if format.learned_codebooks:
            return f"alternating goes row by row, and all rows share the codebooks of {format.name}."
        return None

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns).

        Raises:
            NumericsError: when the statistics that `weighted` needs were not collected.
        """
        shape = (W.shape[0], W.shape[1])
        weight = stats.importance(self.weighted, self.name)
        importance = grouped_importance(weight, shape, format.group_size, format.block).to(W.device)
        x = grouped(W, format.group_size, format.block)
        params = alternate(format, x, importance, format.fit(x, importance, search=False), self.rounds)
        return nearest_matrix(format, W, params)
