"""Rounding to levels as a smooth function, which becomes a step while its temperature falls.

    y = low + gap * (1 + tanh((t - 1/2) / T) / tanh(1 / (2 T))) / 2        t the place of x in the gap, 0 to 1

A level is mapped to itself at every temperature T: y is x at a high one, and the nearest level at 0. Beyond the
outermost levels y is the outermost one.

Source: DSQ (Gong et al. 2019, arXiv 1908.05033), section 3.1, for evenly spaced levels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_rounding(x: Tensor, levels: Tensor, temperature: float) -> Tensor:
    """Return x moved towards its nearest level, with exact gradients of x and of levels.

    Args:
        x: (rows, groups, width).
        levels: (rows|1, groups|1, n), n at least 2, in any order.
        temperature: above 0, in gaps between levels.
    """
    table = levels.sort(-1).values.expand(*x.shape[:2], levels.shape[-1]).contiguous()
    with torch.no_grad():
        below = (torch.searchsorted(table, x.contiguous()) - 1).clamp_(0, levels.shape[-1] - 2)
    low, high = table.gather(-1, below), table.gather(-1, below + 1)
    gap = high - low
    place = torch.where(gap > 0, (x - low) / gap.clamp(min=1e-30), 0.0).clamp(0, 1)
    at_level = torch.tanh(x.new_tensor(0.5 / temperature))
    return low + gap * (1 + torch.tanh((place - 0.5) / temperature) / at_level) / 2
