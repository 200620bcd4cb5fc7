"""Rounding that passes gradients: straight through to what is rounded, as in LSQ to the parameters of its levels.

A number x between two levels is level + t * gap with its place t. Rounding replaces t by 0 or 1, and its gradients
are those of

    y(params) + x - x(params, t)        t fixed

so that dy/dx = 1, and a parameter gets its share in the rounded number less its share in x itself: for a scale
the rounding error in steps, code - x / scale. Beyond the outermost levels x has no gradient, and parameters have
that of the level alone.

Source: LSQ (Esser et al. 2020, arXiv 1902.08153), section 2.1, for evenly spaced levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BEYOND = 0.5  # of a gap: numbers so far beyond the outermost levels are rounded to them, not clipped


def straight_through(y: Tensor, x: Tensor, unrounded: Tensor) -> Tensor:
    """Return y, bit by bit, with the gradients of y + x - unrounded.

    Args:
        y: the rounded numbers.
        x: the numbers, of equal shape.
        unrounded: equal to x up to rounding in fp32, as a function of parameters.
    """
    gap = x - unrounded
    return y + (gap - gap.detach())


def between_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Return x as a function of levels: at its fixed place between two of them, and x itself beyond them.

    Args:
        x: (rows, groups, width).
        levels: (rows|1, groups|1, n), n at least 2, in any order.
    """
    table = levels.sort(-1).values.expand(*x.shape[:2], levels.shape[-1]).contiguous()
    with torch.no_grad():
        below = (torch.searchsorted(table, x.contiguous()) - 1).clamp_(0, levels.shape[-1] - 2)
        low, high = table.gather(-1, below), table.gather(-1, below + 1)
        place = torch.where(high > low, (x - low) / (high - low).clamp(min=1e-30), 0.0)
        rounded = (place >= -BEYOND) & (place <= 1 + BEYOND)
        place.clamp_(-BEYOND, 1 + BEYOND)
    return torch.where(rounded, torch.lerp(table.gather(-1, below), table.gather(-1, below + 1), place), x)
