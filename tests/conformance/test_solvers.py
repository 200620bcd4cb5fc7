"""Laws of solvers, for every registered solver."""

from __future__ import annotations

import json

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.uniform import Uniform
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import SOLVERS, Solver, Statistics
from bitmill.solvers.base import output_error
from helpers.cases import all_solvers, few_formats, fitted, gram_of, inputs, rounded, weights
from helpers.selection import one_of_each, thin

# Ragged groups for every variant of a solver; whole rows and tensors for its defaults.
PAIRS = [
    (solver, format)
    for solver in all_solvers()
    for format in few_formats()
    if solver.unsupported_reason(format) is None and (format.group_size == 40 or solver == type(solver)())
]
PAIRS = one_of_each(PAIRS, lambda pair: (pair[0], type(pair[1])))
every_solver = pytest.mark.parametrize("solver", all_solvers(), ids=repr)
every_pair = pytest.mark.parametrize(("solver", "format"), PAIRS, ids=repr)


def statistics(solver: Solver, rows: int = 6, seed: int = 0) -> Statistics:
    """Return exactly the statistics that the solver needs."""
    gram = gram_of(inputs(seed=seed)) if "gram" in solver.needs else None
    squares = torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed)).pow(4) * 1e-8
    cross = torch.zeros(96, 96) if "cross" in solver.needs else None  # earlier layers made no errors
    return Statistics(gram, 400, cross, squares if "fisher" in solver.needs else None)


@every_pair
@pytest.mark.parametrize("seed", thin([0, 1], [0]))
def test_no_worse_than_nearest(solver, format, seed):
    W, stats = weights(12, seed=seed), statistics(solver, 12, seed)
    solved = solver.solve(W, stats, format).dequantize()
    importance = stats.fisher if stats.gram is None else stats.gram.diagonal()
    nearest = rounded(format, W, fitted(format, W, importance, getattr(solver, "search", False)))
    if getattr(solver, "distance", "value") == "log":
        moved = solved != nearest  # to a level whose logarithm is closer
        one, other = ((W / W_hat)[moved].log2().abs() for W_hat in (solved, nearest))
        assert (one <= other * (1 + 1e-5)).all()
        return
    assert min(one / other for one, other in zip(errors(W, solved, stats), errors(W, nearest, stats))) <= 1 + 1e-5


def errors(W: torch.Tensor, W_hat: torch.Tensor, stats: Statistics) -> list[float]:
    """A solver minimises the error of the outputs, or that of the weights, weighted or not."""
    if stats.fisher is not None:
        return [float(((W - W_hat).square() * stats.fisher).sum())]
    grams = [None] if stats.gram is None else [stats.gram, torch.diag(stats.gram.diagonal())]
    return [output_error(W, W_hat, gram) for gram in grams]


@every_pair
def test_deterministic_and_stored(solver, format, nan_memory):
    W, stats = weights(), statistics(solver)
    before, gram = W.clone(), None if stats.gram is None else stats.gram.clone()
    first, second = solver.solve(W, stats, format), solver.solve(W, stats, format)
    assert torch.equal(W, before)
    assert gram is None or torch.equal(stats.gram, gram)
    assert first.codes.dtype == (torch.uint8 if format.code_bits <= 8 else torch.int32)
    assert first.shape == (6, 96)
    one, other = first.pack(), second.pack()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert torch.isfinite(first.dequantize()).all()
    codes, params = format.unpack(one, first.shape)
    assert torch.equal(codes, first.codes)
    assert all(torch.equal(params[k], first.params[k]) for k in params)


@pytest.mark.parametrize(
    ("solver", "format"),
    one_of_each([p for p in PAIRS if p[1].stackable], lambda pair: (type(pair[0]), type(pair[1]))),
    ids=repr,
)
def test_stacked_rows(solver, format):
    """Layers that read one input are stacked, solved at once and split again."""
    W, stats = weights(12), statistics(solver, 12)
    pieces = solver.solve(W, stats, format).split([5, 7])
    for piece, part, own in zip(pieces, W.split([5, 7]), stats.split([5, 7])):
        alone = solver.solve(part, own, format)
        # products of other shapes round otherwise now and then: a code, or the last digit of an fp16 parameter
        moved = (piece.dequantize() - alone.dequantize()).abs() > part.abs().max() * 2**-10
        assert moved.float().mean() < 0.02


@every_solver
def test_illegal_formats_refused(solver):
    for format in few_formats():
        reason = solver.unsupported_reason(format)
        if reason is None:
            assert Recipe("test", format, solver).weight == format
            continue
        assert reason.endswith(".")
        with pytest.raises(RecipeError, match="cannot be built"):
            Recipe("test", format, solver)


@every_solver
def test_column_block_formats(solver):
    class Pairs(Uniform):
        block = 2
        name = "pairs"

    reason = solver.unsupported_reason(Pairs(3, "row"))
    assert reason is None or reason.endswith(".")


@every_solver
def test_dict_round_trip(solver):
    assert SOLVERS.from_dict(json.loads(json.dumps(solver.to_dict()))) == solver
    kind = type(solver)
    assert eval(repr(solver), {kind.__name__: kind}) == solver


@pytest.mark.parametrize("solver", [s for s in all_solvers() if not s.needs], ids=repr)
def test_data_free_solvers(solver):
    for format in few_formats():
        if solver.unsupported_reason(format) is None:
            assert solver.solve(weights(), Statistics(), format).shape == (6, 96)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_unknown_fields_refused(name):
    with pytest.raises(RecipeError, match="unheard_of"):
        SOLVERS.from_dict({"solver": name, "unheard_of": 1})


def test_solver_name_required():
    with pytest.raises(RecipeError, match="'solver'"):
        SOLVERS.from_dict({"bits": 3})
    with pytest.raises(RecipeError, match="gptq"):
        SOLVERS.from_dict({"solver": "guess"})


def test_output_error_is_relative():
    W, X, format = weights(), inputs(), Uniform(2)
    W_hat = rounded(format, W, fitted(format, W))
    expected = ((X @ (W - W_hat).T).square().sum() / (X @ W.T).square().sum()).item()
    assert output_error(W, W_hat, gram_of(X)) == pytest.approx(expected, rel=1e-4)
    assert output_error(W, W, gram_of(X)) == 0
    assert output_error(W * 0, W * 0, None) == 0
