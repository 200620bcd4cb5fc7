"""SmoothQuant (arXiv 2211.10438): ranges move from activations to weights, outputs stay."""

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.uniform import Uniform
from bitmill.numerics.statistics import Statistics
from bitmill.transforms.base import SeamView
from bitmill.transforms.smooth import SmoothQuant


def case() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs (tokens, 64), three channels of which are 50 times as large, and two layers that read them."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(500, 64, generator=draw)
    X[:, [3, 17, 40]] *= 50
    return X, [torch.randn(rows, 64, generator=draw) * 0.02 for rows in (32, 48)]


def view(X: torch.Tensor, targets: list[torch.Tensor]) -> SeamView:
    seen = Statistics(X.T @ X / len(X), len(X), mean_abs=X.abs().mean(0), max_abs=X.abs().amax(0))
    return SeamView(torch.ones(X.shape[1]), targets, Uniform(8, "row"), seen)


def loudness(A: torch.Tensor) -> float:
    """Loudest channel over the middle one."""
    peaks = A.abs().amax(0)
    return float(peaks.amax() / peaks.median())


def round_8_bits(A: torch.Tensor) -> torch.Tensor:
    """Symmetric 8 bits, one scale a row: W8A8 as in the paper."""
    step = A.abs().amax(1, keepdim=True) / 127
    return (A / step).round() * step


def test_half_alpha_balances():
    X, targets = case()
    s = SmoothQuant().choose(view(X, targets))
    assert loudness(X / s) < 0.25 * loudness(X)
    W = torch.cat(targets)
    torch.testing.assert_close((X / s).abs().amax(0), (W * s).abs().amax(0))  # alpha = 1/2: both sides equal


def test_w8a8_error_falls():
    X, targets = case()
    s = SmoothQuant().choose(view(X, targets))
    for W in targets:
        exact = X @ W.T
        plain = (round_8_bits(X) @ round_8_bits(W).T - exact).norm()
        smooth = (round_8_bits(X / s) @ round_8_bits(W * s).T - exact).norm()
        assert smooth < 0.5 * plain


def test_alpha_trades_ranges():
    X, targets = case()
    ratios = [loudness(X / SmoothQuant(alpha).choose(view(X, targets))) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(RecipeError, match="alpha"):
        SmoothQuant(1.5)


def test_search_is_no_worse_than_a_fixed_alpha():
    X, targets = case()
    exact = X @ torch.cat(targets).T

    def error(s: torch.Tensor) -> float:
        return float((round_8_bits(X / s) @ round_8_bits(torch.cat(targets) * s).T - exact).norm())

    searched = error(SmoothQuant(search=True).choose(view(X, targets)))
    fixed = [error(SmoothQuant(alpha).choose(view(X, targets))) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert searched < 1.1 * min(fixed)
