"""Coordinate descent on the output error, after error feedback has made its one pass.

GPTQ never looks back: a column rounded early cannot answer for what later columns did. Two kinds of step
do, and neither can raise the objective tr((W - W^) H (W - W^)^T), H the damped Gram:

    column   re-round column j to the value that is best given the errors of all others,
             w^_j + (E H)_j / H_jj  with E = W - W^;
    group    give a whole group new parameters: with everything else fixed its best real values are
             t = w^_g + (E H)_g H_gg^-1; fit the group's parameters to t, round t with error feedback inside
             the group, and keep the result in the rows where the objective falls.

Columns are QuantEase's steps (Behdin et al. 2023, arXiv 2309.01885, section 3.2) and QuIP's greedy passes;
the group step alternates codes and parameters in the metric that matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import GroupFormat, Params
from bitmill.formats.grouped import Rounder, of_group
from bitmill.numerics.cholesky import inverse_factor

_BLOCK = 32


class Descent:
    """Codes and parameters of one matrix, improved in place.

    W, Q: (columns, rows) fp32, float and stored values, columns in natural order.
    codes: (columns, rows) uint8.  H: (columns, columns), positive definite.  width: columns of a group.
    """

    def __init__(
        self, W: Tensor, Q: Tensor, codes: Tensor, H: Tensor, format: GroupFormat, params: Params, width: int
    ) -> None:
        self.Q, self.codes, self.H, self.format, self.width = Q, codes, H, format, width
        self.params = {name: value.clone() for name, value in params.items()}
        self.gradient = H @ (W - Q)  # (columns, rows): H times the error, kept up to date

    def columns_pass(self, order: Tensor) -> None:
        """Re-round every column once, in `order`."""
        rounders = [self.format.rounder(of_group(self.params, g)) for g in range(self._groups())]
        diagonal = self.H.diagonal().tolist()
        for block in order.split(_BLOCK):
            local = self.gradient[block]
            couple = self.H[block][:, block]
            moved = torch.zeros_like(local)
            for k, j in enumerate(block.tolist()):
                round_column: Rounder = rounders[min(j // self.width, len(rounders) - 1)]
                codes, value = round_column(self.Q[j] + local[k] / diagonal[j])
                torch.sub(value, self.Q[j], out=moved[k])
                self.Q[j], self.codes[j] = value, codes
                local.addr_(couple[k], moved[k], alpha=-1)
            self.gradient.addmm_(self.H[:, block], moved, alpha=-1)

    def groups_pass(self) -> None:
        """Offer every group new parameters and codes, once, in natural order."""
        for group in range(self._groups()):
            cut = slice(group * self.width, min((group + 1) * self.width, self.Q.shape[0]))
            H = self.H[cut, cut].contiguous()
            U, _ = inverse_factor(H, 1e-6)
            inverse = U.T @ U
            target = self.Q[cut] + inverse @ self.gradient[cut]  # (width, rows)
            fresh = self._fit(target, 1 / inverse.diagonal(), group)
            codes, value = _feed_back(target, U, self.format.rounder(fresh))
            moved = value - self.Q[cut]
            # the exact change of the objective, whatever rounding `target` has been through
            better = (moved * (H @ moved)).sum(0) < 2 * (moved * self.gradient[cut]).sum(0)
            self._keep(fresh, group, better)
            moved = torch.where(better, moved, 0.0)
            self.Q[cut] = torch.where(better, value, self.Q[cut])
            self.codes[cut] = torch.where(better, codes, self.codes[cut])
            self.gradient.addmm_(self.H[:, cut], moved, alpha=-1)

    def _fit(self, target: Tensor, importance: Tensor, group: int) -> Params:
        return self.format.fit_group(target.T[:, None, :], importance[None, None, :], of_group(self.params, group))

    def _groups(self) -> int:
        return max(value.shape[1] for value in self.params.values())

    def _keep(self, fresh: Params, group: int, better: Tensor) -> None:
        for name, value in self.params.items():
            if (value.shape[1] == 1 < self._groups()) or (value.shape[0] == 1 < self.Q.shape[1]):
                continue  # shared by the row or by all rows, and left alone by fit_group
            chosen = better.reshape(-1, *([1] * (value.dim() - 2)))
            value[:, group] = torch.where(chosen, fresh[name][:, 0], value[:, group])


def _feed_back(target: Tensor, U: Tensor, round_column: Rounder) -> tuple[Tensor, Tensor]:
    """Error feedback inside one group: codes and values, (width, rows) each."""
    rest = target.clone()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    values = torch.empty_like(rest)
    for k in range(rest.shape[0]):
        codes[k], values[k] = round_column(rest[k])
        rest[k + 1 :].addr_(U[k, k + 1 :], (rest[k] - values[k]) / U[k, k], alpha=-1)
    return codes, values
