"""Bootstrap intervals of a mean over positions of text.

Resampled are windows, and not positions: predictions on one passage are good or bad together, so single positions
would promise a narrower interval than the text supports. Fewer than BLOCKS windows are divided into blocks of
consecutive positions, whose interval is too narrow where passages differ. The mean over several domains is
resampled within each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

BLOCKS = 8  # drawn from at least
RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


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
