"""BinaryCoding: sums of signed magnitudes, W^ = beta + sum_i alpha_i b_i with b_i in {-1, +1}.

    code   unsigned, `bits` bits; bit i is 1 where b_i = +1
    alpha  fp16, `bits` magnitudes a group
    beta   fp16, one a group; only with `offset`

Any uniform grid is the special case alpha_i = scale * 2^i / 2. Bits a weight: bits * (1 + 16/group_size),
and 16/group_size more with an offset, which is much in small groups: see `integer_coding` for a compact form of
these numbers.

Source: Xu et al. 2018, "Alternating Multi-bit Quantization" (arXiv 1802.00150), sections 3 and 4; the table
form is LUT-GEMM's (arXiv 2206.09557), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import alternate, as_stored
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat

_ROUNDS = 15


@FORMATS.register("binary_coding")
@dataclass(frozen=True)
class BinaryCoding(ScalarFormat):
    """Signed sums of `bits` magnitudes per tensor, row or group; `bits` 1 to 5."""

    offset: bool = False

    max_bits: ClassVar[int] = 5  # the least-squares refit solves for `bits` unknowns, and 2**bits levels

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Choose residual magnitudes greedily; `search` then alternates codes and least squares.

        Returns:
            "alpha" (rows, groups, bits) and, with offset, "beta" (rows, groups).
        """
        params = self._greedy(x, importance)
        return alternate(self, x, importance, params, _ROUNDS) if search else params

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the magnitudes (and the offset) by weighted least squares, kept where they lower the error.

        Codes take only 2**bits values, so the sums of weights and of weighted x per code suffice.
        """
        index = codes.long()
        weight = importance.expand(x.shape)
        empty = x.new_zeros(*x.shape[:-1], 1 << self.bits)
        mass = empty.scatter_add(-1, index, weight)
        moment = empty.scatter_add(-1, index, weight * x)
        signs = self._signs(x.device)
        basis = torch.cat([signs, torch.ones_like(signs[:, :1])], 1) if self.offset else signs
        products = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # (2**bits, unknowns^2)
        normal = (mass @ products).unflatten(-1, (basis.shape[1], basis.shape[1]))
        ridge = 1e-6 * mass.sum(-1).clamp(min=1e-30)  # planes may coincide
        normal = normal + ridge[..., None, None] * torch.eye(basis.shape[1], device=x.device)
        solution = torch.linalg.solve(normal, moment @ basis)
        trial = {"alpha": as_stored(solution[..., : self.bits])}
        if self.offset:
            trial["beta"] = as_stored(solution[..., self.bits])
        better = self._error(mass, moment, trial) < self._error(mass, moment, params)
        return {
            name: torch.where(better if v.dim() == 2 else better[..., None], v, params[name])
            for name, v in trial.items()
        }

    def _error(self, mass: Tensor, moment: Tensor, params: Params) -> Tensor:
        """Return the weighted squared error of each group, without the constant sum of x^2."""
        table = self.levels(params)
        return (mass * table.square() - 2 * moment * table).sum(-1)

    @property
    def can_shift(self) -> bool:
        """True with an offset."""
        return self.offset

    def shift(self, params: Params, by: Tensor) -> Params:
        """Move the offset."""
        return {**params, "beta": as_stored(params["beta"] + by)}

    def levels(self, params: Params) -> Tensor:
        """Return beta + sum of +-alpha; entry c is that of code c."""
        alpha = params["alpha"]
        table = alpha @ self._signs(alpha.device).T.to(alpha.dtype)
        return table + params["beta"][..., None] if self.offset else table

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return fp16 alpha, and fp16 beta with an offset."""
        grid = self.grid(shape)
        alpha = Part("alpha", (*grid, self.bits))
        return (alpha, Part("beta", grid)) if self.offset else (alpha,)

    def _signs(self, device: torch.device) -> Tensor:
        """Return (2**bits, bits) of -1 and +1: row c holds the bits of code c."""
        codes = torch.arange(1 << self.bits, device=device)
        return 2.0 * ((codes[:, None] >> torch.arange(self.bits, device=device)) & 1) - 1.0

    def _greedy(self, x: Tensor, importance: Tensor) -> Params:
        total = importance.sum(-1).clamp(min=1e-30)
        beta = (x * importance).sum(-1) / total if self.offset else torch.zeros_like(x[..., 0])
        rest, alphas = x - beta[..., None], []
        for _ in range(self.bits):
            alpha = (rest.abs() * importance).sum(-1) / total
            alphas.append(alpha)
            rest = rest - alpha[..., None] * torch.where(rest >= 0, 1.0, -1.0)
        params = {"alpha": as_stored(torch.stack(alphas, -1))}
        if self.offset:
            params["beta"] = as_stored(beta)
        return params
