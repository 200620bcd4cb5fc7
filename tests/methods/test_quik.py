"""QUIK (arXiv 2310.09259): 4-bit products work once the columns of largest inputs are in float."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.outlier_columns import OutlierColumns, base_columns
from bitmill.formats.uniform import Uniform
from bitmill.numerics.sparse import from_index
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from helpers.cases import gram_of, inputs, weights

LARGE = [3, 40, 77]


def outlying(tokens: int = 400, seed: int = 0) -> torch.Tensor:
    X = inputs(tokens, columns=96, seed=seed)
    X[:, LARGE] *= 60
    return X


def statistics(X: torch.Tensor) -> Statistics:
    return Statistics(gram_of(X), len(X), max_abs=X.abs().amax(0))


def output_error(format, solver=None) -> float:
    W, X = weights(24, 96), outlying(seed=1)
    solved = solve(solver or GPTQ(), W, statistics(outlying()), format)
    y = solved.effective_inputs(X) @ solved.dequantize().T
    return float((y - X @ W.T).square().sum() / (X @ W.T).square().sum())


def test_outliers_are_found_and_kept():
    W = weights(24, 96)
    solved = solve(Nearest(), W, statistics(outlying()), OutlierColumns(Uniform(8, "row"), 3))
    assert from_index(solved.params["outlier_columns"]).tolist() == LARGE


def test_four_bits_fail_without_outlier_columns():
    four = Inputs(Uniform(4, "row"))
    plain = output_error(four.around(Uniform(4, "row", symmetric=True)))
    split = output_error(four.around(OutlierColumns(Uniform(4, "row", symmetric=True), 8)))
    assert split < 0.2 * plain


def test_errors_flow_into_the_outliers():
    """The values are the least-squares best for the base that was stored."""
    W, X = weights(24, 96), inputs(columns=96)
    solved = solve(GPTQ(), W, statistics(X), OutlierColumns(Uniform(3, "row"), 8))
    outliers = from_index(solved.params["outlier_columns"])
    base = base_columns(outliers, 96)
    stored = solved.dequantize()
    best = torch.linalg.lstsq(
        X[:, outliers].double(), (X @ W.T - X[:, base] @ stored[:, base].T).double()
    ).solution.T

    def error(values: torch.Tensor) -> float:
        return float((X @ W.T - X[:, base] @ stored[:, base].T - X[:, outliers] @ values.float().T).norm())

    assert error(stored[:, outliers]) <= 1.01 * error(best)
    assert error(W[:, outliers]) > 1.05 * error(best)


def test_feedback_beats_rounding():
    format = OutlierColumns(Uniform(3, "row"), 8)
    assert output_error(format) < 0.8 * output_error(format, Nearest(search=True))


def test_recipe_has_wide_layers():
    recipe = build_recipe("quik")
    assert recipe.scheme("model.layers.0.mlp.down_proj").format.bits == 8
    assert recipe.scheme("model.layers.0.mlp.up_proj").format.bits == 4
    assert recipe.scheme("model.layers.0.mlp.up_proj").format.inner.inputs.bits == 4


@pytest.mark.parametrize("columns", [1, 64, 1000])
def test_at_most_half_of_the_columns(columns):
    format = OutlierColumns(Uniform(4, 16), columns)
    solved = solve(Nearest(), weights(8, 20), statistics(inputs(columns=20)), format)
    assert solved.params["outlier_values"].shape == (8, min(columns, 10))
    assert 8 * sum(t.nbytes for t in solved.pack().values()) == format.stored_bits((8, 20))
