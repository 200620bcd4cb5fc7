"""Rounding that passes gradients straight through, for tuners that learn weights or the ranges of their grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.formats.scalar import RangeFormat


def round_in_range(x: Tensor, low: Tensor, high: Tensor, format: RangeFormat) -> Tensor:
    """Clamp x to a range and round it on the grid of that range; gradients reach x, low and high.

    Rounding passes gradients as if it were the identity, so that with steps = W^ / scale
    dW^/dx = 1 inside the range, dW^/dlow = 1 below it, dW^/dhigh = 1 above it, and everywhere
    dW^/dscale = steps - clamp(x) / scale.

    Args:
        x: (rows, groups, width).
        low, high: (rows, groups) each.
        format: without search, its `fit` takes the range from minimum to maximum.

    Returns:
        The stored numbers, (rows, groups, width).
    """
    rounded: Tensor = _RoundInRange.apply(x, low, high, format)
    return rounded


class _RoundInRange(torch.autograd.Function):
    """The autograd function of `round_in_range`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, format: RangeFormat) -> Tensor:
        clamped = x.clamp(low[..., None], high[..., None])
        params = format.fit(clamped, x.new_ones(1, 1, 1), search=False)
        y = format.decode(format.nearest(clamped, params), params)
        side = (x > clamped).to(torch.int8) - (x < clamped).to(torch.int8)
        ctx.save_for_backward((y - clamped) / params["scale"][..., None], side, low, high)
        ctx.format = format
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        residual, side, low, high = ctx.saved_tensors
        of_scale = (grad * residual).sum(-1) / ((1 << ctx.format.bits) - 1)
        if ctx.format.symmetric:  # scale is 2 max(high, -low) / (2^b - 1)
            up = high >= -low
            of_low, of_high = torch.where(up, 0, -2 * of_scale), torch.where(up, 2 * of_scale, 0)
        else:
            of_low, of_high = -of_scale, of_scale
        of_low = of_low + (grad * (side < 0)).sum(-1)
        of_high = of_high + (grad * (side > 0)).sum(-1)
        return grad * (side == 0) if ctx.needs_input_grad[0] else None, of_low, of_high, None
