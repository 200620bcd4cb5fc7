"""Codebooks shared by all layers of a kind, on matrices too small for codebooks of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import Format, Params
from bitmill.formats.additive import Additive
from bitmill.formats.permuted import Permuted
from bitmill.formats.quantized import Quantized, total_stored_bits
from bitmill.formats.shared import Shared
from bitmill.formats.uniform import Uniform
from bitmill.formats.wrapper import reduce_to_core
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.solvers.beam import BeamSearch
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest

LAYERS, ROWS, COLUMNS = 8, 96, 96
SHAPE = (ROWS, COLUMNS)
SOLVER = BeamSearch(rounds=6, sweeps=1)


def layer(seed: int, columns: int = COLUMNS) -> tuple[Tensor, Statistics]:
    """Weights of one heavy-tailed distribution, rows of any size, and correlated inputs of the layer's own."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=draw) / columns**0.5
    X = torch.randn(1024, columns, generator=draw) @ mix * (0.5 * torch.randn(columns, generator=draw)).exp()
    W = torch.randn(ROWS, columns, generator=draw) * torch.rand(ROWS, 1, generator=draw).add(0.5)
    W = W * (0.4 * torch.randn(W.shape, generator=draw)).exp() * 0.02
    return W, Statistics(X.T @ X / 1024, 1024)


def learned(format: Format, layers: int = LAYERS, solver: BeamSearch = SOLVER, columns: int = COLUMNS) -> Params:
    learner = solver.learner(format.core, layers)
    for seed in range(layers):
        learner.add_layer(*reduce_to_core(*layer(seed, columns), format))
    return learner.learn()


def solved(format: Format, seed: int, shared: Params | None = None, columns: int = COLUMNS) -> Quantized:
    W, stats = layer(seed, columns)
    return solve(SOLVER, W, replace(stats, shared=shared), format)


def error(format: Format, seeds: range, shared: Params | None = None) -> float:
    """Mean relative error of the outputs."""
    made = [(layer(seed), solved(format, seed, shared)) for seed in seeds]
    return sum(output_error(W, q.dequantize(), stats.gram) for (W, stats), q in made) / len(made)


@pytest.mark.parametrize("wrap", [lambda f: f, Permuted], ids=["plain", "permuted"])
def test_beats_own_codebooks(wrap) -> None:
    ours, theirs = wrap(Shared(Additive(6, codebooks=3))), wrap(Additive(4, codebooks=4))
    bits = [total_stored_bits((f, SHAPE, "q_proj") for _ in range(LAYERS)) for f in (ours, theirs)]
    assert bits[0] < 0.95 * bits[1]
    seeds = range(3)
    assert error(ours, seeds, learned(ours)) < 0.9 * error(theirs, seeds)


def test_search_beats_kmeans() -> None:
    format = Shared(Additive(5, codebooks=2))
    kmeans = error(format, range(20, 23), learned(format, solver=replace(SOLVER, rounds=0)))
    trained = error(format, range(20, 23), learned(format))
    assert trained < 0.98 * kmeans
    assert trained < 0.98 * error(format, range(20, 23), learned(format, layers=1))


def test_given_codebooks_are_kept() -> None:
    format = Permuted(Shared(Additive(4, codebooks=2)))
    shared = learned(format)
    first, second = solved(format, 0, shared), solved(format, 1, shared)
    for one in (first, second):
        assert torch.equal(one.params["codebooks"], shared["codebooks"])
        assert one.format == format
    assert not torch.equal(first.params["scale"], second.params["scale"])
    alone = solved(format, 0)  # a kind of one
    assert not torch.equal(alone.params["codebooks"], shared["codebooks"])
    read_back = format.unpack_shared(format.pack_shared(shared))
    assert torch.equal(read_back["codebooks"], shared["codebooks"])


@pytest.mark.parametrize("columns", [96, 90, 20, 5])
@pytest.mark.parametrize("size", ["row", 16, "tensor"])
def test_ragged_groups(columns: int, size: int | str) -> None:
    format = Shared(Additive(2, size, 2))
    shared = learned(format, 2, columns=columns)
    W, stats = layer(0, columns)
    assert output_error(W, solved(format, 0, shared, columns).dequantize(), stats.gram) < 0.6


def test_learning_is_deterministic() -> None:
    format = Shared(Additive(3, codebooks=2))
    assert torch.equal(learned(format, 2)["codebooks"], learned(format, 2)["codebooks"])
    learner = SOLVER.learner(format.core, 3)
    W, stats = layer(0)
    dead = stats.gram.clone()
    dead[:50] = dead[:, :50] = 0
    before = W.clone()
    for matrix, gram in ((W * 0, stats.gram), (W, stats.gram * 0), (W, dead)):
        learner.add_layer(matrix, Statistics(gram, 1024))
    assert torch.equal(W, before)
    assert learner.learn()["codebooks"].isfinite().all()
    nothing = SOLVER.learner(format.core, 1)
    nothing.add_layer(W * 0, stats)
    assert not solved(format, 0, nothing.learn()).dequantize().any()


def test_bits_counted_once() -> None:
    format = Permuted(Shared(Additive(8, codebooks=2)))
    codes, books, scales, order = 64 * 512 // 8 * 16, 2 * 256 * 8 * 16, 64 * 16, 512 * 9
    assert format.stored_bits((64, 512)) == codes + books + scales + order
    assert format.own_bits((64, 512)) == codes + scales + order
    together = [(format, (64, 512), kind) for kind in ("q", "q", "k", "q")]
    assert total_stored_bits(together) == 4 * (codes + scales + order) + 2 * books
    assert total_stored_bits([(Uniform(3), (8, 64), "q")] * 2) == 2 * Uniform(3).stored_bits((8, 64))


def test_unshareable_formats_refused() -> None:
    with pytest.raises(RecipeError, match="uniform has no parts that layers could share"):
        Shared(Uniform(3))
    for solver in (Nearest(), GPTQ()):
        with pytest.raises(RecipeError, match="cannot learn codebooks for many layers"):
            Recipe("test", Shared(Additive(4)), solver)
    plain, shared = build_recipe("aqlm"), build_recipe("aqlm", {"shared": "true"})
    assert shared == replace(plain, weight=Shared(plain.weight))
    assert Recipe.from_yaml(shared.to_yaml()) == shared
