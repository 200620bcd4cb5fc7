"""Bootstrap intervals of a mean over positions of text.

Resampled are blocks of consecutive positions of a window, and not positions: predictions on one passage are good
or bad together, so single positions would promise a narrower interval than the text gives. The mean over several
domains is resampled within each of them. An interval speaks for more text of these documents and their like.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

BLOCK = 128  # positions that are drawn together
RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


def bootstrap_means(windows: Sequence[Tensor], generator: np.random.Generator) -> np.ndarray:
    """Return the means (RESAMPLES,) of resampled blocks.

    Args:
        windows: a value for every position (n,) of each window.
        generator: draws the blocks.
    """
    blocks = [block.double() for window in windows for block in window.split(BLOCK)]
    sums = np.array([float(block.sum()) for block in blocks])
    sizes = np.array([len(block) for block in blocks])
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):  # one at a time: 100,000 blocks would take 1.6 GB together
        drawn = generator.integers(len(blocks), size=len(blocks))
        means[index] = sums[drawn].sum() / sizes[drawn].sum()
    return means


def percentile_interval(means: np.ndarray) -> list[float]:
    """Return the ends of the interval that holds LEVEL of the resampled means."""
    tail = (1 - LEVEL) / 2
    return [float(end) for end in np.quantile(means, (tail, 1 - tail), method="inverted_cdf")]
