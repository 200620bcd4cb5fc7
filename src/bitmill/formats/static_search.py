"""Search the parameters of one group for all inputs of a layer, coarse to fine (FPCS).

A pool of candidates is narrowed by the error of the numbers themselves on a sample; the best of them are compared
by the error of the layer's outputs, and refined around their scales in steps that shrink.

Source: Wu et al. 2024, "AdaLog" (arXiv 2407.12951), section 3.3, fast progressive combining search. There a pool
of 128 is refined five times; here the first pool is larger, because sampled numbers are compared first.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bitmill.formats.base import Params

_FEW, _NUMBERS = 1 << 11, 1 << 14  # sampled of the inputs, for the pool and for the best of it
_ROWS = 128  # tokens whose outputs are compared
_POOLED, _KEPT, _REFINED = 48, 16, 2  # candidates behind the pool, the larger sample, and each refinement
_STEPS = (0.1, 0.1 / 7.5)  # relative, of scales


@runtime_checkable
class StaticFormat(Protocol):
    """A format of which parameters of one group for all inputs can be searched."""

    def static_candidates(self, x: Tensor) -> Params:
        """Return parameters to choose from, (candidates, 1) each.

        Args:
            x: numbers to cover, any shape.
        """
        ...

    def static_neighbours(self, params: Params, step: float) -> Params:
        """Return parameters near others, (candidates, 1) each.

        Args:
            params: of one group, (1, 1) each.
            step: largest relative change of the scale.
        """
        ...

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Return the codes of numbers (1, 1, n)."""
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return the numbers of codes (1, 1, n)."""
        ...


def search_static(format: StaticFormat, x: Tensor, W: Tensor | None = None) -> Params:
    """Return the parameters of least error.

    Args:
        format: the format, with one group for all inputs.
        x: inputs (tokens, columns), fp32.
        W: the matrix (out, columns) that multiplies them; without it the error is that of the inputs.

    Returns:
        Parameters of one group, (1, 1) each.
    """
    best = Errors(format, _sample(x, _FEW), None).least(format.static_candidates(x), _POOLED)
    errors = Errors(format, _sample(x, _NUMBERS), None)
    best = errors.least(_joined(best), _KEPT)
    if W is not None:
        rows = x[:: max(1, x.shape[0] // _ROWS)]
        errors = Errors(format, rows.reshape(1, 1, -1), W)
        best = errors.least(_joined(best), _REFINED)
    for step in _STEPS:
        pool = [format.static_neighbours(params, step) for params in best]
        best = errors.least(_joined([*best, *pool]), _REFINED)
    return best[0]


class Errors:
    """Squared errors of rounded numbers, of themselves or of the outputs that they give.

    Args:
        format: the format.
        x: numbers (1, 1, n).
        W: (out, columns), of which x holds whole tokens; None for the errors of the numbers.
    """

    def __init__(self, format: StaticFormat, x: Tensor, W: Tensor | None) -> None:
        self._format, self._x = format, x
        # error e of a token adds e W^T W e^T: a product with W, or with the square root of the smaller W^T W
        self._W = W if W is None or W.shape[0] <= W.shape[1] else torch.linalg.qr(W, mode="r").R

    def least(self, params: Params, count: int) -> list[Params]:
        """Return the `count` best of candidates (candidates, 1), the best first, (1, 1) each."""
        each = [{name: value[i : i + 1] for name, value in params.items()} for i in range(len(params["scale"]))]
        errors = [self._error(one) for one in each]
        order = sorted(range(len(each)), key=errors.__getitem__)
        return [each[i] for i in order[:count]]

    def _error(self, params: Params) -> float:
        error = self._format.decode(self._format.nearest(self._x, params), params) - self._x
        if self._W is not None:
            error = error.view(-1, self._W.shape[1]) @ self._W.T
        return float(error.square().sum())


def _sample(x: Tensor, numbers: int) -> Tensor:
    """Return about so many numbers of x, the smallest and the largest among them, (1, 1, n)."""
    flat = x.reshape(-1)
    return torch.cat([flat[:: max(1, flat.numel() // numbers)], *map(torch.atleast_1d, flat.aminmax())])[
        None, None
    ]


def _joined(params: list[Params]) -> Params:
    return {name: torch.cat([one[name] for one in params]) for name in params[0]}
