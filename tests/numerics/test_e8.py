"""The E8 codebook of 65536 points: its points, and the exact search."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.numerics.e8 import POINTS, nearest, patterns, points


def brute_force(x: torch.Tensor) -> torch.Tensor:
    """Smallest squared distance to any point, fp64."""
    table = points().double()
    square = table.square().sum(1)
    return torch.cat(
        [(v.square().sum(1) + (square - 2 * v @ table.T).amin(1)) for v in x.double()[:, None].unbind()]
    )


def reached(x: torch.Tensor) -> torch.Tensor:
    return (x.double() - points()[nearest(x)].double()).square().sum(1)


def test_points_on_shifted_e8() -> None:
    """Twice a point minus the shift is odd everywhere, and its sum is a multiple of 4."""
    shift = torch.where(torch.arange(POINTS) >= POINTS // 2, 0.25, -0.25)
    doubled = 2 * (points() - shift[:, None])
    assert torch.equal(doubled % 2, torch.ones(POINTS, 8))
    assert not (doubled.sum(1) % 4).any()
    assert len(torch.unique(points(), dim=0)) == POINTS


def test_patterns_match_paper() -> None:
    norms, counts = patterns().square().sum(1).unique(return_counts=True)
    assert norms.tolist() == [2, 4, 6, 8, 10, 12]
    assert counts.tolist() == [1, 8, 28, 64, 126, 29]


@pytest.mark.parametrize("spread", [0.1, 1.03, 4.0])
def test_nearest_equals_brute_force(spread: float) -> None:
    x = torch.randn(300, 8) * spread
    assert torch.allclose(reached(x), brute_force(x), rtol=1e-5, atol=1e-6)


@given(st.lists(st.lists(st.integers(-16, 16), min_size=8, max_size=8), min_size=1, max_size=4))
def test_nearest_with_ties(rows: list[list[int]]) -> None:
    x = torch.tensor(rows, dtype=torch.float32) / 4
    assert torch.allclose(reached(x), brute_force(x), atol=1e-6)


def test_points_are_fixed_points() -> None:
    codes = nearest(points())
    assert torch.equal(codes, torch.arange(POINTS))
    assert nearest(torch.zeros(0, 8)).shape == (0,)


def test_gaussian_error() -> None:
    """Between the best 2-bit scalar levels (0.1175) and the rate-distortion bound (0.0625)."""
    x = torch.randn(20000, 8)
    error = (x - points()[nearest(x * 1.03)] / 1.03).square().mean()
    assert 0.090 < error < 0.093


def test_numbering_is_frozen() -> None:
    quarters = (points() * 4).to(torch.int8).numpy().tobytes()
    assert (
        hashlib.sha256(quarters).hexdigest() == "0c10682aa0c1feb74c540e33e47326d82778ab8a8c2ecba806235bae3bccd448"
    )
