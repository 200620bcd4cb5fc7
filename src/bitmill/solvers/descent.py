"""Coordinate descent on the output error, after the one pass of error feedback.

GPTQ never revisits a column: one that is rounded early cannot compensate for later columns. Two kinds of step
do, and neither can raise the objective tr((W - W^) H (W - W^)^T), H the damped Gram:

    column   re-round column j to the value that is best given the errors of all others,
             w^_j + (E H)_j / H_jj  with E = W - W^; formats that code blocks re-round a block to the number
             nearest to w^_B + (E H)_B H_BB^-1, and keep it in the rows where the objective falls;
    group    give a whole group new parameters: with everything else fixed its best real values are
             t = w^_g + (E H)_g H_gg^-1; fit the group's parameters to t, round t with error feedback inside
             the group, and keep the result in the rows where the objective falls.

Columns are QuantEase's steps (Behdin et al. 2023, arXiv 2309.01885, section 3.2) and QuIP's greedy passes;
the group step alternates codes and parameters in the metric of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import GroupFormat, Params
from bitmill.formats.base import Rounder
from bitmill.formats.fitting import group_params
from bitmill.numerics.cholesky import inverse_factor
from bitmill.solvers.compiled import sorted_levels
from bitmill.solvers.feedback import StaticGrids, block_codes, round_block, run_error_feedback

_BLOCK = 32


class Descent:
    """Codes and parameters of one matrix, improved in place.

    W, Q: (columns, rows) fp32, float and stored values, columns in natural order.
    codes: (format.codes_in(columns), rows).  H: (columns, columns), positive definite.
    width: columns of a group.
    """

    def __init__(
        self, W: Tensor, Q: Tensor, codes: Tensor, H: Tensor, format: GroupFormat, params: Params, width: int
    ) -> None:
        self.Q, self.codes, self.H, self.format, self.width = Q, codes, H, format, width
        self.params = {name: value.clone() for name, value in params.items()}
        self.gradient = H @ (W - Q)  # (columns, rows): H times the error, kept up to date

    def columns_pass(self, order: Tensor) -> None:
        """Re-round every column, or block of columns, once, in `order`."""
        levels = sorted_levels(self.format, self.params, self.Q.shape[1])
        if levels is not None:
            groups = (order // self.width).clamp(max=self._groups() - 1).to(torch.int32)
            for block, group in zip(order.split(_BLOCK), groups.split(_BLOCK)):
                H = self.H[block]
                moved = levels.descend(
                    group, H[:, block].contiguous(), block, self.gradient[block], self.Q, self.codes
                )
                self.gradient.addmm_(H.T, moved, alpha=-1)
            return
        rounders = [self.format.rounder(group_params(self.params, g)) for g in range(self._groups())]
        if self.format.block > 1:
            for first in order[:: self.format.block].tolist():
                self._block_step(first, rounders[min(first // self.width, len(rounders) - 1)])
            return
        diagonal = self.H.diagonal().tolist()
        for block in order.split(_BLOCK):
            groups_independent = self.gradient[block]
            couple = self.H[block][:, block]
            moved = torch.zeros_like(groups_independent)
            for k, j in enumerate(block.tolist()):
                round_column: Rounder = rounders[min(j // self.width, len(rounders) - 1)]
                codes, value = round_column(self.Q[j] + groups_independent[k] / diagonal[j])
                torch.sub(value, self.Q[j], out=moved[k])
                self.Q[j], self.codes[j] = value, codes
                groups_independent.addr_(couple[k], moved[k], alpha=-1)
            self.gradient.addmm_(self.H[:, block], moved, alpha=-1)

    def _block_step(self, first: int, rounder: Rounder) -> None:
        """Re-round the block of columns that starts at `first`."""
        cut = slice(first, min(first + self.format.block, self.Q.shape[0]))
        target = self.Q[cut] + torch.linalg.solve(self.H[cut, cut], self.gradient[cut])
        self._take(cut, *round_block(rounder, target, self.format.block))

    def groups_pass(self) -> None:
        """Try new parameters and codes for every group, once, in natural order."""
        for group in range(self._groups()):
            cut = slice(group * self.width, min((group + 1) * self.width, self.Q.shape[0]))
            U, _ = inverse_factor(self.H[cut, cut].contiguous(), 1e-6)
            inverse = U.T @ U
            target = self.Q[cut] + inverse @ self.gradient[cut]  # (width, rows)
            fresh = self._fit(target, 1 / inverse.diagonal(), group)
            grids = StaticGrids(self.format, fresh, torch.zeros(len(target), dtype=torch.int64))
            codes = run_error_feedback(target, U, grids, self.format)
            self._keep(fresh, group, self._take(cut, codes, target))

    def _take(self, cut: slice, codes: Tensor, value: Tensor) -> Tensor:
        """Replace blocks of columns in the rows where the objective falls; return these rows, bool (rows,)."""
        moved = value - self.Q[cut]
        # the exact change of the objective, whatever the new value has been through
        better = (moved * (self.H[cut, cut] @ moved)).sum(0) < 2 * (moved * self.gradient[cut]).sum(0)
        here = block_codes(self.format, cut)
        self.Q[cut] = torch.where(better, value, self.Q[cut])
        self.codes[here] = torch.where(better, codes, self.codes[here])
        self.gradient.addmm_(self.H[:, cut], torch.where(better, moved, 0.0), alpha=-1)
        return better

    def _fit(self, target: Tensor, importance: Tensor, group: int) -> Params:
        missing = -target.shape[0] % self.format.block  # a ragged last block
        x, weight = (torch.nn.functional.pad(v, (0, missing)) for v in (target.T, importance))
        return self.format.fit_group(x[:, None, :], weight[None, None, :], group_params(self.params, group))

    def _groups(self) -> int:
        return max(value.shape[1] for value in self.params.values())

    def _keep(self, fresh: Params, group: int, better: Tensor) -> None:
        for name, value in self.params.items():
            if (value.shape[1] == 1 < self._groups()) or (value.shape[0] == 1 < self.Q.shape[1]):
                continue  # shared by the row or by all rows, and left alone by fit_group
            chosen = better.reshape(-1, *([1] * (value.dim() - 2)))
            value[:, group] = torch.where(chosen, fresh[name][:, 0], value[:, group])
