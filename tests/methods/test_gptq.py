"""GPTQ matches its paper and LDLQ, against references in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitmill.errors import NumericsError, RecipeError
from bitmill.formats import Format
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.solvers import Statistics
from bitmill.solvers import feedback as module
from bitmill.solvers.base import output_error
from bitmill.solvers.gptq import GPTQ
from helpers.cases import COLUMNS, fitted, gram_of, group_params, inputs, rounded, weights

ROWS = 16
FORMATS = [Uniform(b, size) for b in (2, 3, 4) for size in (32, 40, "row")] + [Uniform(3, "tensor")]
NATURAL = GPTQ(act_order=False)
LOCAL = GPTQ(act_order=False, static_groups=False)


def solve(solver: GPTQ, W: Tensor, gram: Tensor, format: Format) -> Quantized:
    return solver.solve(W, Statistics(gram, 400), format)


def ldlq(W: Tensor, H: Tensor, round_column) -> Tensor:
    """QuIP, equation 2: w^_k = Q(w_k + (w_1..k-1 - w^_1..k-1) a_k), H = (A + I) D (A + I)^T, A strictly upper.

    A (float64) comes from the unit-lower LDL factor of the matrix with its columns reversed.
    round_column(k, w): the storable numbers nearest to w (rows,), float64.  Returns W^ (rows, columns).
    """
    R = torch.linalg.cholesky(H.double().flip(0, 1))
    L = R / R.diagonal()  # unit lower: reversed H = L D L^T
    A = L.flip(0, 1) - torch.eye(H.shape[0], dtype=torch.float64)
    W, W_hat = W.double(), torch.zeros_like(W, dtype=torch.float64)
    for k in range(W.shape[1]):
        W_hat[:, k] = round_column(k, W[:, k] + (W[:, :k] - W_hat[:, :k]) @ A[:k, k])
    return W_hat


def damped(gram: Tensor, damp: float = 0.01) -> Tensor:
    gram = gram.double()
    return gram + damp * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.float64)


def nearest_level(table: Tensor, w: Tensor) -> Tensor:
    """table (rows|1, levels) and w (rows,) to the closest level of each row, float64."""
    table = table.double().expand(w.shape[0], -1)
    return table.gather(1, (table - w[:, None]).abs().argmin(1, keepdim=True))[:, 0]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_equals_textbook_ldlq(format, act_order):
    W, gram = weights(ROWS), gram_of(inputs())
    params = fitted(format, W, gram.diagonal())
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(COLUMNS)
    width = format.group_size if isinstance(format.group_size, int) else COLUMNS

    def round_column(k: int, w: Tensor) -> Tensor:
        return nearest_level(format.levels(group_params(params, int(order[k]) // width))[:, 0], w)

    expected = torch.empty(ROWS, COLUMNS)
    expected[:, order] = ldlq(W[:, order], damped(gram)[order][:, order], round_column).float()
    solved = solve(GPTQ(act_order=act_order), W, gram, format)
    assert torch.allclose(solved.dequantize(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [32, 40])
def test_local_grids_refit_per_group(size):
    W, gram, format = weights(ROWS), gram_of(inputs()), Uniform(3, size)
    U = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    work, expected, table = W.double(), torch.empty(ROWS, COLUMNS), None
    for j in range(COLUMNS):
        if j % size == 0:
            group = slice(j, j + size)
            params = fitted(format, work[:, group].float(), gram.diagonal()[group])
            table = format.levels(params)[:, 0]
        value = nearest_level(table, work[:, j])
        expected[:, j] = value.float()
        work[:, j:] -= ((work[:, j] - value) / U[j, j])[:, None] * U[j, j:]
    solved = solve(LOCAL, W, gram, format)
    assert torch.allclose(solved.dequantize(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", [GPTQ(), NATURAL, LOCAL], ids=repr)
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_block_size_does_not_matter(solver, block, monkeypatch):
    W, gram, format = weights(ROWS), gram_of(inputs()), Uniform(3, 40)
    usual = solve(solver, W, gram, format)
    monkeypatch.setattr(module, "_CHUNK", block)
    assert torch.equal(solve(solver, W, gram, format).codes, usual.codes)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_equals_nearest_if_independent(format, scale):
    W = weights(ROWS)
    solved = solve(GPTQ(), W, scale * torch.eye(COLUMNS), format).dequantize()
    assert torch.equal(solved, rounded(format, W, fitted(format, W)))


@pytest.mark.parametrize("solver", [GPTQ(), NATURAL, LOCAL], ids=repr)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_trades_weight_for_output_error(solver, bits, seed):
    """The paper's claim: a larger error in the weights, a smaller one in the outputs, held-out inputs included."""
    W, format = weights(32, seed=seed), Uniform(bits, 32)
    gram, held_out = gram_of(inputs(2000, seed=seed)), gram_of(inputs(500, seed=seed + 50))
    solved = solve(solver, W, gram, format).dequantize()
    nearest = rounded(format, W, fitted(format, W))
    assert output_error(W, solved, None) > output_error(W, nearest, None)
    assert output_error(W, solved, gram) < 0.8 * output_error(W, nearest, gram)
    assert output_error(W, solved, held_out) < 0.8 * output_error(W, nearest, held_out)


@pytest.mark.parametrize("solver", [GPTQ(), NATURAL, LOCAL], ids=repr)
@pytest.mark.parametrize("loudness", [1.0, 1e-3, 1e3])
def test_dead_inputs_stored_as_zero(solver, loudness):
    X = inputs() * loudness
    dead = [0, 5, 50, 95]
    X[:, dead] = 0
    W = weights(ROWS)
    W[:, dead] = 100.0
    solved = solve(solver, W, gram_of(X), Uniform(3, 32)).dequantize()
    assert not solved[:, dead].any()
    assert torch.isfinite(solved).all()
    live = torch.ones(COLUMNS, dtype=torch.bool)
    live[dead] = False
    if solver.static_groups:
        expected = solve(solver, W[:, live], gram_of(X[:, live]), Uniform(3, "row"))
        whole = solve(solver, W, gram_of(X), Uniform(3, "row"))
        assert torch.equal(whole.codes[:, live], expected.codes)


def test_all_dead_inputs():
    solved = solve(GPTQ(), weights(), torch.zeros(COLUMNS, COLUMNS), Uniform(3))
    assert not solved.dequantize().any()


@pytest.mark.parametrize("solver", [GPTQ(damp=1e-9), GPTQ(damp=1e-9, act_order=False)], ids=repr)
def test_singular_gram_is_damped(solver):
    few = gram_of(inputs(tokens=3))  # rank 3
    indefinite = gram_of(inputs()) - 0.02 * gram_of(inputs()).diagonal().mean() * torch.eye(COLUMNS)
    for gram in (few, indefinite):
        solved = solve(solver, weights(), gram, Uniform(4)).dequantize()
        assert torch.isfinite(solved).all()
        assert output_error(weights(), solved, few) < 0.05


@pytest.mark.parametrize("solver", [GPTQ(), NATURAL, LOCAL], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_statistics_refused(solver, bad):
    gram = gram_of(inputs())
    gram[7, 7] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        solve(solver, weights(), gram, Uniform(3))
    with pytest.raises(NumericsError, match="NaN or Inf"):
        solve(solver, weights(), torch.full((COLUMNS, COLUMNS), bad), Uniform(3))


def test_missing_statistics_message():
    with pytest.raises(NumericsError, match="calibration text"):
        GPTQ().solve(weights(), Statistics(), Uniform(3))


@pytest.mark.parametrize("damp", [0, -1, 100, math.nan])
def test_damping_range(damp):
    with pytest.raises(RecipeError, match="damp"):
        GPTQ(damp=damp)


def test_act_order_static_groups():
    with pytest.raises(RecipeError, match="static_groups"):
        GPTQ(act_order=True, static_groups=False)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (2, 65)])
@pytest.mark.parametrize("solver", [GPTQ(), NATURAL, LOCAL], ids=repr)
def test_odd_shapes(shape, solver):
    rows, columns = shape
    gram = gram_of(inputs(columns=columns))
    assert solve(solver, weights(rows, columns), gram, Uniform(3, 16)).dequantize().shape == shape


def test_act_order_helps():
    W, gram, format = weights(64), gram_of(inputs(2000)), Uniform(2, "row")
    by_order = output_error(W, solve(GPTQ(), W, gram, format).dequantize(), gram)
    by_nature = output_error(W, solve(NATURAL, W, gram, format).dequantize(), gram)
    assert by_order < by_nature
