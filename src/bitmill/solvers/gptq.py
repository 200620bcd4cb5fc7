"""GPTQ: round one input column at a time, and let the remaining columns absorb the error.

Problem      minimise tr((W - W^) G (W - W^)^T) over storable W^, G = X^T X / tokens
Step         with (G + damp*mean(diag G)*I)^-1 = U^T U:   e_j = (w_j - w^_j) / U_jj,   w_k -= e_j U_jk  (k > j)
Needs        the Gram matrix; cost out*in^2 multiplications plus the factorization in^3
Grids        fitted before the loop from the original weights (`static_groups`, which act-order needs), or
             when the loop reaches a group, from the weights that already carry its neighbours' corrections
Order        act-order takes the columns with the largest mean square first, while most freedom is left
Importance   of a column when grids are fitted: its mean square G_jj, or 1 / (G^-1)_jj, the cost of an error
             there once the other columns have compensated for it
Passes       optional coordinate descent afterwards, see `descent`
Limits       rounding to a finite grid voids the optimality of the unbounded case; groups whose inputs are
             nearly collinear need more damping

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
from bitmill.formats import GroupFormat
from bitmill.formats.quantized import Quantized, fit_matrix
from bitmill.numerics.cholesky import inverse_factor
from bitmill.numerics.statistics import GRAM, Statistics
from bitmill.solvers.base import SOLVERS, Solver
from bitmill.solvers.descent import Descent
from bitmill.solvers.feedback import LocalGrids, StaticGrids, run_error_feedback, visiting_order, zero_dead_inputs


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

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return a reason for formats whose parameters cannot be fitted when these options require it."""
        if not self.static_groups and not format.groups_independent:
            return f"{format.name} fits all groups of a row together, so it needs static_groups=true."
        if not self.static_groups and format.group_size == "tensor":
            return "one grid for the whole tensor cannot be fitted group by group; set static_groups=true."
        if self.group_passes and format.group_size == "tensor":
            return "group_passes refit one group at a time, and the whole tensor is one; set group_passes=0."
        return None

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns), in the metric of stats.gram.

        Raises:
            NumericsError: when there is no Gram matrix, or it cannot be factorized.
        """
        W, gram, dead = zero_dead_inputs(W, stats.required_gram(self.name))
        columns = W.shape[1]
        order = visiting_order(gram.diagonal().masked_fill(dead, 0.0), format.block, self.act_order)
        U, damp = inverse_factor(gram.index_select(0, order).index_select(1, order), self.damp)
        importance = gram.diagonal()
        if self.importance == "inverse":
            importance = torch.empty_like(importance)
            importance[order] = 1 / U.square().sum(0)
        importance = importance.masked_fill(dead, 0.0)

        width = format.width((W.shape[0], columns))
        grids: StaticGrids | LocalGrids
        if self.static_groups:
            grids = StaticGrids(format, fit_matrix(format, W, importance, self.search), order // width)
        else:
            grids = LocalGrids(format, importance, self.search, width)
        visited = run_error_feedback(W.T[order].contiguous(), U, grids, format)
        codes = torch.empty_like(visited)
        blocks = order[:: format.block] // format.block
        codes.unflatten(0, (len(blocks), -1))[blocks] = visited.unflatten(0, (len(blocks), -1))
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
