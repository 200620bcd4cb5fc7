"""GPTQ: round one input column at a time, and let the columns to come absorb the error.

Problem      minimise tr((W - W^) G (W - W^)^T) over storable W^, G = X^T X / tokens
Step         with (G + damp*mean(diag G)*I)^-1 = U^T U:   e_j = (w_j - w^_j) / U_jj,   w_k -= e_j U_jk  (k > j)
Needs        the Gram matrix; cost out*in^2 multiplications plus the factorization in^3
Grids        fitted before the loop from the original weights (`static_groups`, which act-order needs), or
             when the loop reaches a group, from the weights that already carry its neighbours' corrections
Order        act-order takes the columns with the largest mean square first, while most freedom is left
Importance   of a column when grids are fitted: its mean square G_jj, or 1 / (G^-1)_jj, what an error there
             costs once the other columns have answered it
Passes       optional coordinate descent afterwards, see `descent`
Limits       rounding to a finite grid voids the optimality of the unbounded case; groups whose inputs are
             nearly collinear want more damping

Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), section 3 and algorithm 1. The loop is LDLQ of QuIP
(arXiv 2307.13304, theorem 6), which the tests check. The block-local grid differs from the released code,
which fits a group from weights that lack the updates of the running block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat, Params
from bitmill.formats.grouped import Rounder, of_group
from bitmill.numerics.cholesky import inverse_factor
from bitmill.quantized import Quantized, fit_matrix
from bitmill.solvers.base import GRAM, SOLVERS, Solver, Statistics
from bitmill.solvers.descent import Descent

# Columns updated one by one before the rest of the matrix receives their sum in one product. Small enough
# that a block of a 3000-row matrix stays in the cache.
_BLOCK = 32


@SOLVERS.register("gptq")
@dataclass(frozen=True)
class GPTQ(Solver):
    """Error feedback through the inverse Gram matrix."""

    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    search: bool = True
    importance: Literal["diagonal", "inverse"] = "diagonal"
    column_passes: int = 0
    group_passes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.column_passes < 0 or self.group_passes < 0:
            raise RecipeError(
                f"column_passes is {self.column_passes!r} and group_passes {self.group_passes!r}; use 0 or more."
            )
        if not 0 < self.damp < 100:
            raise RecipeError(f"damp is {self.damp!r}; use a positive share of the mean diagonal, such as 0.01.")
        if self.act_order and not self.static_groups:
            raise RecipeError(
                "act_order visits columns of all groups in turn, so it needs static_groups: "
                "set static_groups=true or act_order=false."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix of the layer's inputs."""
        return GRAM

    def accepts(self, format: GroupFormat) -> str | None:
        """Formats that code one column at a time."""
        if format.block != 1:
            return f"gptq rounds single columns, and {format.name} codes {format.block} columns jointly."
        if not self.static_groups and not format.local:
            return f"{format.name} fits all groups of a row together, so it needs static_groups=true."
        if not self.static_groups and format.group_size == "tensor":
            return "one grid for the whole tensor cannot be fitted group by group; set static_groups=true."
        if self.group_passes and format.group_size == "tensor":
            return "group_passes refit one group at a time, and the whole tensor is one; set group_passes=0."
        return None

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns), against stats.gram."""
        gram = stats.required_gram(self.name)
        dead = gram.diagonal() == 0
        if bool(dead.any()):
            gram, W, live = gram.clone(), W.clone(), ~dead
            # The mean of the others: damping is a share of the mean, which dead inputs must not move.
            gram.diagonal()[dead] = gram.diagonal()[live].mean() if bool(live.any()) else 1.0
            W[:, dead] = 0.0  # an input that is always 0 contributes nothing, whatever its weight

        columns = W.shape[1]
        order = torch.arange(columns, device=W.device)
        if self.act_order:
            order = torch.argsort(gram.diagonal().masked_fill(dead, 0.0), descending=True, stable=True)
        U, damp = inverse_factor(gram.index_select(0, order).index_select(1, order), self.damp)
        importance = gram.diagonal()
        if self.importance == "inverse":
            importance = torch.empty_like(importance)
            importance[order] = 1 / U.square().sum(0)
        importance = importance.masked_fill(dead, 0.0)

        width = format.width((W.shape[0], columns))
        grids: _Grids
        if self.static_groups:
            grids = _StaticGrids(format, fit_matrix(format, W, importance, self.search), order // width)
        else:
            grids = _LocalGrids(format, importance, self.search, width)
        visited = feed_back(W.T[order].contiguous(), U, grids)
        codes = torch.empty_like(visited)
        codes[order] = visited
        solved = Quantized(format, codes.T.contiguous(), grids.params, (W.shape[0], columns))
        if not self.column_passes and not self.group_passes:
            return solved
        damped = gram.clone()
        damped.diagonal().add_(damp * gram.diagonal().mean())
        return self._descend(W, solved, format, damped, order, width)

    def _descend(
        self, W: Tensor, solved: Quantized, format: GroupFormat, H: Tensor, order: Tensor, width: int
    ) -> Quantized:
        """Improve a solution by coordinate descent on the damped Gram H."""
        Q = solved.dequantize().T.contiguous()
        codes = solved.codes.T.contiguous()
        descent = Descent(W.T.contiguous(), Q, codes, H, format, solved.params, width)
        for turn in range(max(self.column_passes, self.group_passes)):
            if turn < self.group_passes:
                descent.groups_pass()
            if turn < self.column_passes:
                descent.columns_pass(order)
        return Quantized(format, descent.codes.T.contiguous(), descent.params, solved.shape)


def feed_back(Wt: Tensor, U: Tensor, grids: _Grids) -> Tensor:
    """The loop. Wt (columns, rows) in visiting order, overwritten; returns codes uint8 (columns, rows).

    Columns are kept as contiguous rows, because each step reads one and updates those after it.
    """
    columns, rows = Wt.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=Wt.device)
    diagonal = U.diagonal().tolist()
    start = 0
    while start < columns:
        stop = grids.stop(start, min(start + _BLOCK, columns))
        errors = torch.empty(stop - start, rows, device=Wt.device)
        for j in range(start, stop):
            codes[j], value = grids.rounder(j, Wt)(Wt[j])
            error = torch.sub(Wt[j], value, out=errors[j - start]).div_(diagonal[j])
            Wt[j + 1 : stop].addr_(U[j, j + 1 : stop], error, alpha=-1)
        Wt[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return codes


class _StaticGrids:
    """Grids fitted beforehand; columns may come in any order."""

    def __init__(self, format: GroupFormat, params: Params, groups: Tensor) -> None:
        self.params = params
        count = max(value.shape[1] for value in params.values())
        self._rounders = [format.rounder(of_group(params, g)) for g in range(count)]
        self._groups = groups.clamp(max=count - 1).tolist()

    def stop(self, start: int, stop: int) -> int:
        return stop

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        return self._rounders[self._groups[column]]


class _LocalGrids:
    """Grids fitted as the loop reaches each group, from weights that carry every correction so far."""

    def __init__(self, format: GroupFormat, importance: Tensor, search: bool, width: int) -> None:
        self._format, self._importance, self._search, self._width = format, importance, search, width
        self._fitted: list[Params] = []

    def stop(self, start: int, stop: int) -> int:
        """Blocks end where groups end: inside a block, later columns still lack the block's updates."""
        return min(stop, (start // self._width + 1) * self._width)

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        if column % self._width == 0:
            cut = slice(column, column + self._width)
            self._fitted.append(fit_matrix(self._format, Wt[cut].T, self._importance[cut], self._search))
            self._current = self._format.rounder(self._fitted[-1])
        return self._current

    @property
    def params(self) -> Params:
        return {name: torch.cat([p[name] for p in self._fitted], 1) for name in self._fitted[0]}


_Grids = _StaticGrids | _LocalGrids
