"""Round to nearest: fit the parameters, then take the closest storable number.

Data-free by default. `weighted` selects the weights of squared errors when parameters are fitted: "diagonal"
the mean square of the weight's input, "fisher" the loss's mean squared gradient by the weight.

`distance` "log" rounds logarithms, as methods of powers of two do: between two levels of one sign the threshold is
their geometric mean, 2^(e + 1/2) between 2^e and 2^(e + 1), in place of their mean, 1.5 * 2^e. Next to 0 it stays
the mean, half of the smallest power.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitmill.formats import GroupFormat, Params, ScalarFormat
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.numerics.grouping import grouped
from bitmill.numerics.statistics import WEIGHTED, Statistics
from bitmill.solvers.base import SOLVERS, Solver


@SOLVERS.register("nearest")
@dataclass(frozen=True)
class Nearest(Solver):
    """Nearest rounding; `search` looks for better parameters than the closed-form start."""

    search: bool = False
    weighted: Literal["nothing", "diagonal", "fisher"] = "nothing"
    distance: Literal["value", "log"] = "value"

    @property
    def needs(self) -> frozenset[str]:
        """No statistics, unless errors are weighted."""
        return WEIGHTED[self.weighted]

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return why logarithms cannot be compared: vectors have none."""
        if self.distance == "value" or isinstance(format, ScalarFormat):
            return None
        return f"Logarithms of single numbers are rounded, and {format.name} codes {format.block} columns jointly."

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns).

        Raises:
            NumericsError: when the statistics that `weighted` needs were not collected.
        """
        importance = stats.importance(self.weighted, self.name)
        params = fit_matrix(format, W, importance, self.search)
        if self.distance == "value":
            return nearest_matrix(format, W, params)
        assert isinstance(format, ScalarFormat)
        codes = nearest_in_log(format, grouped(W, format.group_size), params)
        flat = codes.reshape(W.shape[0], -1)[:, : W.shape[1]].contiguous()
        return Quantized(format, flat, params, (W.shape[0], W.shape[1]))


def nearest_in_log(format: ScalarFormat, x: Tensor, params: Params) -> Tensor:
    """Return the codes of the levels whose logarithms are closest, see above.

    Args:
        x: (rows, groups, width).
        params: of its groups.

    Returns:
        uint8 (rows, groups, width).
    """
    levels, order = format.levels(params).sort(dim=-1, stable=True)
    low, high = levels[..., :-1], levels[..., 1:]
    product = low * high
    edges = torch.where(product > 0, low.sign() * low.abs().sqrt() * high.abs().sqrt(), (low + high) / 2)
    rank = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for k in range(edges.shape[-1]):
        rank += x > edges[..., k : k + 1]
    return order.expand(*x.shape[:-1], order.shape[-1]).gather(-1, rank).to(torch.uint8)
