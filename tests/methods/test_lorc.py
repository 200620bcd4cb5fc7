"""LoRC (ZeroQuant-V2, arXiv 2303.08302): a product of low rank takes back part of the rounding error."""

from __future__ import annotations

import torch

from bitmill.formats.low_rank import LowRank
from bitmill.formats.uniform import Uniform
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import gram_of, inputs, weights


def error(format, gram=None) -> float:
    W, X = weights(48, 96), inputs(columns=96)
    solved = solve(Nearest(), W, Statistics(gram_of(X), len(X)), format)
    return output_error(W, solved.dequantize(), gram)


def test_error_falls_with_rank():
    gram = gram_of(inputs(columns=96, seed=5))
    errors = [error(Uniform(3, 32), gram), *(error(LowRank(Uniform(3, 32), rank), gram) for rank in (2, 8, 24))]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


def test_unweighted_is_the_truncated_decomposition():
    W = weights(48, 96)
    solved = solve(Nearest(), W, Statistics(), LowRank(Uniform(4, 32), 8, weighted=False))
    plain = solve(Nearest(), W, Statistics(), Uniform(4, 32))
    U, S, V = torch.linalg.svd(W - plain.dequantize(), full_matrices=False)
    best = plain.dequantize() + (U[:, :8] * S[:8]) @ V[:8]
    assert (solved.dequantize() - best).norm() <= 1e-3 * (W - best).norm()


def test_weighted_is_better_for_outputs():
    gram = gram_of(inputs(columns=96))
    assert error(LowRank(Uniform(3, 32), 8), gram) < error(LowRank(Uniform(3, 32), 8, weighted=False), gram)
