"""The table of a side: which numbers its codes stand for before scale and zero."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from bitmill.formats.fitting import as_stored, positive
from bitmill.kv.scheme import TensorScheme

_ROUNDS = 2000


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits rising levels of least squared error for a standard normal number.

    Lloyd 1982 and Max 1960: every level is the mean of its interval, every edge the middle between two levels.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    count = 1 << bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(_ROUNDS):
        edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
    return tuple(levels.tolist())


def fixed_levels(side: TensorScheme) -> Tensor:
    """Levels that are not learned, fp32 (2**bits,)."""
    if side.levels == "normal":
        return torch.tensor(normal_levels(side.bits))
    return torch.arange(1 << side.bits, dtype=torch.float32)


def affine(low: Tensor, high: Tensor, side: TensorScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero, as fp16 keeps them, that map what lies from low to high onto the levels.

    Uniform levels reach from 0 to 2**bits - 1, learned ones were learned for -1 to 1.
    """
    if side.levels == "uniform":
        scale, zero = (high - low) / ((1 << side.bits) - 1), low
    else:
        scale, zero = (high - low) / 2, (high + low) / 2
    return as_stored(positive(scale)), as_stored(zero)
