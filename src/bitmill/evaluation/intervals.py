"""Intervals: exact ones of a share, and bootstrap intervals of a mean over positions of text.

Resampled are windows, and not positions: predictions on one passage are good or bad together, so single positions
would promise a narrower interval than the text supports. Fewer than BLOCKS windows are divided into blocks of
consecutive positions, whose interval is too narrow where passages differ. The mean over several domains is
resampled within each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

BLOCKS = 8  # drawn from at least
RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


def exact_interval(right: int, asked: int) -> list[float]:
    """Return the ends of the exact (Clopper-Pearson) interval of a share, with probability LEVEL.

    Args:
        right: answers that are right, 0 to `asked`.
        asked: at least 1.
    """
    tail = (1 - LEVEL) / 2
    low = 0.0 if right == 0 else _bisect(lambda share: _probability(range(right, asked + 1), asked, share) < tail)
    high = 1.0 if right == asked else _bisect(lambda share: _probability(range(right + 1), asked, share) >= tail)
    return [low, high]


def _probability(counts: range, asked: int, share: float) -> float:
    """Return the binomial probability of these counts, through logarithms, since the coefficients overflow."""
    yes, no = math.log(share), math.log1p(-share)
    coefficients = (math.lgamma(asked + 1) - math.lgamma(k + 1) - math.lgamma(asked - k + 1) for k in counts)
    return math.fsum(math.exp(c + k * yes + (asked - k) * no) for k, c in zip(counts, coefficients, strict=True))


def _bisect(below: Callable[[float], bool]) -> float:
    """Return the share in (0, 1) up to which a condition holds."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def bootstrap_means(windows: Sequence[Tensor], generator: np.random.Generator) -> np.ndarray:
    """Return the means (RESAMPLES,) of resampled windows or blocks.

    Args:
        windows: a value for every position (n,) of each window.
        generator: draws them.
    """
    blocks = _blocks(windows)
    sums = np.array([float(block.double().sum()) for block in blocks])
    sizes = np.array([len(block) for block in blocks])
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):  # one at a time: 100,000 windows would take 1.6 GB together
        drawn = generator.integers(len(blocks), size=len(blocks))
        means[index] = sums[drawn].sum() / sizes[drawn].sum()
    # a resample of n has (n - 1) / n of the variance of a new sample
    mean = sums.sum() / sizes.sum()
    stretch = math.sqrt(len(blocks) / max(1, len(blocks) - 1))
    return mean + stretch * (means - mean) if np.isfinite(mean) else means


def percentile_interval(means: np.ndarray) -> list[float]:
    """Return the ends of the interval that holds LEVEL of the resampled means."""
    tail = (1 - LEVEL) / 2
    return [float(end) for end in np.quantile(means, (tail, 1 - tail), method="inverted_cdf")]


def _blocks(windows: Sequence[Tensor]) -> list[Tensor]:
    """Return the windows, or equal parts of each where there are fewer than BLOCKS windows."""
    parts = -(-BLOCKS // len(windows))
    return [block for window in windows for block in window.tensor_split(min(parts, len(window)))]
