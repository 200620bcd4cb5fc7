"""LLM.int8() (arXiv 2208.07339): W8A8 fails on large channels, and the decomposition repairs it."""

from __future__ import annotations

import torch

from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import weights


def outputs(method: str, X: torch.Tensor, **options) -> torch.Tensor:
    solved = solve(Nearest(), weights(24, 96), Statistics(), build_recipe(method, options).default.format)
    return solved.effective_inputs(X) @ solved.dequantize().T


def with_large_channels() -> torch.Tensor:
    X = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    X[:, [5, 60]] *= 40
    return X


def test_decomposition_has_the_error_of_the_weights():
    X, W = with_large_channels(), weights(24, 96)
    exact = X @ W.T
    plain, split = ((outputs(m, X) - exact).norm() for m in ("w8a8", "llm_int8"))
    weight_only = (outputs("llm_int8", X, threshold=1e-9) - exact).norm()
    assert split < 1.1 * weight_only
    assert plain > 1.8 * weight_only


def test_small_inputs_are_all_rounded():
    X = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    assert torch.equal(outputs("llm_int8", X), outputs("w8a8", X))


def test_scales_of_tokens_beat_one_for_all():
    """Vector-wise quantization against a static scale of all inputs (section 2 and table 1)."""
    X = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 50)[:, None]
    W = weights(24, 96)
    static = build_recipe("w8a8", {"static": True}).default.format
    solved = solve(Nearest(), W, Statistics(max_abs=X.abs().amax(0)), static)
    exact = X @ W.T

    def relative(Y: torch.Tensor) -> float:
        return float(((Y - exact).norm(dim=1) / exact.norm(dim=1)).mean())

    assert relative(outputs("w8a8", X)) < 0.2 * relative(solved.effective_inputs(X) @ solved.dequantize().T)
