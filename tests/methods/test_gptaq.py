"""GPTAQ (arXiv 2504.02692): a layer compensates the errors of its inputs."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import NumericsError, RecipeError
from bitmill.formats.sum import Sum
from bitmill.formats.uniform import Uniform
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.gptaq import GPTAQ
from bitmill.solvers.gptq import GPTQ
from helpers.cases import gram_of, inputs, weights


def disturbed(seed: int = 0, tokens: int = 800) -> tuple[torch.Tensor, torch.Tensor]:
    """The float model's inputs, and what is left of them after coarse layers: a mixture, shrunk and noisy."""
    X_float = inputs(tokens, seed=seed)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(96) * 0.9 + torch.randn(96, 96, generator=generator) * 0.02
    generator.manual_seed(seed + 50)
    noise = torch.randn(X_float.shape, generator=generator)
    return X_float, X_float @ mixing + 0.1 * X_float.std(0) * noise


def statistics(X_float: torch.Tensor, X: torch.Tensor) -> Statistics:
    return Statistics(gram_of(X), X.shape[0], (X_float - X).T @ X / X.shape[0])


def held_out_error(solved: torch.Tensor, W: torch.Tensor) -> float:
    X_float, X = disturbed(seed=1)
    return float((X_float @ W.T - X @ solved.T).square().sum() / (X_float @ W.T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_gptq(bits):
    W, format = weights(24), Uniform(bits, 32)
    stats = statistics(*disturbed())
    plain = GPTQ().solve(W, stats, format).dequantize()
    asymmetric = solve(GPTAQ(alpha=1.0), W, stats, format).dequantize()
    assert held_out_error(asymmetric, W) < 0.9 * held_out_error(plain, W)


@pytest.mark.parametrize("bits", [2, 3])
def test_sparse_values(bits):
    W, stats = weights(24), statistics(*disturbed())
    dense, both = (
        solve(GPTAQ(alpha=1.0), W, stats, format).dequantize()
        for format in (Uniform(bits, 32), Sum(Uniform(bits, 32), outliers=0.02))
    )
    plain = solve(GPTQ(), W, stats, Sum(Uniform(bits, 32), outliers=0.02)).dequantize()
    assert held_out_error(both, W) < 0.95 * min(held_out_error(dense, W), held_out_error(plain, W))


def test_zero_correction_is_gptq():
    W, format, stats = weights(24), Uniform(3, 32), statistics(*disturbed())
    expected = GPTQ().solve(W, stats, format).dequantize()
    assert torch.equal(solve(GPTAQ(alpha=0.0), W, stats, format).dequantize(), expected)
    same = Statistics(stats.gram, stats.tokens, torch.zeros_like(stats.gram))
    assert torch.equal(solve(GPTAQ(alpha=1.0), W, same, format).dequantize(), expected)


def test_dead_inputs():
    X_float, X = disturbed()
    X_float[:, 5] = X[:, 5] = 0
    solved = solve(GPTAQ(), weights(), statistics(X_float, X), Uniform(4, 32)).dequantize()
    assert torch.isfinite(solved).all()


def test_needs_cross_statistics():
    assert GPTAQ().needs == {"gram", "cross"}
    with pytest.raises(NumericsError, match="float model's inputs"):
        solve(GPTAQ(), weights(), Statistics(gram_of(inputs()), 400), Uniform(3))
    with pytest.raises(RecipeError, match="alpha"):
        GPTAQ(alpha=1.5)
