"""The exact interval of a share."""

from __future__ import annotations

import pytest

from bitmill.evaluation.intervals import exact_interval


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
        (85, 100, 0.7647, 0.9135),
        (2, 3000, 0.0000808, 0.0024062),  # its coefficients overflow
    ],
)
def test_exact_interval(right, asked, low, high):
    assert exact_interval(right, asked) == pytest.approx([low, high], rel=1e-3, abs=1e-9)
