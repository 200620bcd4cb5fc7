"""HQQ: half-quadratic quantization, a data-free search for the zero of every group.

Problem    min over zeros of sum |w - w^|^p, p < 1: large errors may stay large, so outliers do not drag the grid
Split      w - w^ is tied to a free error e:  |e|^p + beta/2 (e - (w - w^))^2, beta growing
Steps      e = sign(r) max(|r| - |r|^(p-1) / beta, 0),  r = w - w^        (generalised soft threshold)
           all levels of the group move by the mean of r - e              (for a uniform grid: its zero)
Keeps      the scale; of all zeros on the way, for every group the one of least sum |w - w^|^p

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs). The
threshold depends on the unit that r is measured in; here it is the step of the group's grid. In the released
code it is that of the weights, whose errors are so small that every e is 0 and the zero is a plain mean; that
code also stops at the first rise of the mean error over the whole matrix, and then keeps the last zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat, Params
from bitmill.formats.fitting import in_slices
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.numerics.grouping import grouped, grouped_importance
from bitmill.numerics.statistics import NOTHING, Statistics
from bitmill.solvers.base import SOLVERS, Solver


@SOLVERS.register("hqq")
@dataclass(frozen=True)
class HQQ(Solver):
    """Half-quadratic rounds from the format's closed-form start."""

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise RecipeError(f"p is {self.p!r}; use a norm above 0 and up to 1.")
        if self.beta <= 0 or self.growth < 1 or self.rounds < 0:
            raise RecipeError(
                f"beta is {self.beta!r}, growth {self.growth!r} and rounds {self.rounds!r}; use a positive beta, "
                "a growth of 1 or more, and 0 or more rounds."
            )

    @property
    def needs(self) -> frozenset[str]:
        """No statistics."""
        return NOTHING

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return a reason for formats whose levels cannot move."""
        if not format.can_shift:
            return (
                f"hqq moves the zero of every group, and that of {format.name} is fixed or an integer; "
                "use uniform with zero=float."
            )
        return None

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns).

        Returns:
            Codes and parameters whose zero of every group has the least sum |w - w^|^p of all rounds.
        """
        x = grouped(W, format.group_size)
        weight = grouped_importance(None, (W.shape[0], W.shape[1]), format.group_size).to(W.device)

        def improve(x: Tensor, weight: Tensor, params: Params) -> Params:
            return self._improve(format, x, weight, params)

        params = in_slices(improve, x, weight, format.fit(x, weight, search=False))
        return nearest_matrix(format, W, params)

    def _improve(self, format: GroupFormat, x: Tensor, weight: Tensor, params: Params) -> Params:
        best, least = params, torch.full(x.shape[:2], torch.inf, device=x.device)
        total = weight.sum(-1)
        step = torch.ones_like(least)
        for turn in range(self.rounds + 1):
            rest = x - format.decode(format.nearest(x, params), params)
            loss = (rest.abs().pow(self.p) * weight).sum(-1)
            best = {
                name: torch.where((loss < least).reshape(*loss.shape, *[1] * (v.dim() - 2)), params[name], v)
                for name, v in best.items()
            }
            least = torch.minimum(loss, least)
            if turn == 0:  # errors of rounding to an even grid spread over its step: variance step^2 / 12
                step = (12 * (rest.square() * weight).sum(-1) / total).sqrt().clamp(min=1e-30)
            size = rest.abs() / step[..., None]
            kept = (size - size.pow(self.p - 1) / (self.beta * self.growth**turn)).clamp_(min=0)
            free = rest.sign() * kept * step[..., None]
            params = format.shift(params, ((rest - free) * weight).sum(-1) / total)
        return best
