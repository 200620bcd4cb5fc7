"""SqueezeLLM (arXiv 2306.07629): its claims on seeded layers with heavy tails and uneven gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import Format
from bitmill.formats import sum as module
from bitmill.formats.codebook import Codebook
from bitmill.formats.quantized import Quantized
from bitmill.formats.sum import Sum
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Solver, Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest

ROWS, COLUMNS = 48, 1024
PLAIN, FISHER = Nearest(search=True), Nearest(search=True, weighted="fisher")


def layer(seed: int) -> tuple[Tensor, Statistics]:
    """Student-t weights, and squared gradients that are uneven over rows, columns and single weights."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(ROWS, COLUMNS, generator=draw)
    W = 0.02 * W / torch.randn(ROWS, COLUMNS, 4, generator=draw).square().mean(-1).sqrt()
    sizes = (torch.randn(ROWS, 1, generator=draw) + torch.randn(1, COLUMNS, generator=draw)).exp()
    fisher = sizes * torch.randn(ROWS, COLUMNS, 3, generator=draw).square().mean(-1) * 1e-8
    return W, Statistics(fisher=fisher)


def solved(seed: int, solver: Solver, format: Format) -> Quantized:
    W, stats = layer(seed)
    return solve(solver, W, stats, format)


def loss(seed: int, matrix: Quantized) -> float:
    """The second-order rise of the loss, relative to removing the layer."""
    W, stats = layer(seed)
    return float(((W - matrix.dequantize()).square() * stats.fisher).sum() / (W.square() * stats.fisher).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fisher_weights_levels(bits: int, seed: int) -> None:
    """Section 4.1: more error in the weights, less in the loss."""
    blind, weighted = solved(seed, PLAIN, Codebook(bits)), solved(seed, FISHER, Codebook(bits))
    W = layer(seed)[0]
    assert output_error(W, weighted.dequantize(), None) > output_error(W, blind.dequantize(), None)
    assert loss(seed, weighted) < 0.92 * loss(seed, blind)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (4, 64)])
@pytest.mark.parametrize("solver", [PLAIN, FISHER], ids=["blind", "weighted"])
def test_beats_uniform_levels(bits: int, group_size: int, seed: int, solver: Solver) -> None:
    """Figure 2, at no more bits than a uniform grid in groups."""
    free, even = solved(seed, solver, Codebook(bits)), solved(seed, solver, Uniform(bits, group_size))
    assert free.bits_per_weight <= even.bits_per_weight
    assert loss(seed, free) < 0.97 * loss(seed, even)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("solver", [PLAIN, FISHER], ids=["blind", "weighted"])
def test_dense_and_sparse_helps(bits: int, seed: int, solver: Solver) -> None:
    """Section 4.2 and appendix D.3: better than dense, and than dense in groups at about equal bits."""
    both, dense = solved(seed, solver, Sum(Codebook(bits))), solved(seed, solver, Codebook(bits))
    in_groups = solved(seed, solver, Codebook(bits, COLUMNS // 2))
    assert dense.bits_per_weight < both.bits_per_weight < dense.bits_per_weight + 0.17
    assert both.bits_per_weight < in_groups.bits_per_weight + 0.04
    assert loss(seed, both) < 0.75 * loss(seed, dense)
    assert loss(seed, both) < 0.98 * loss(seed, in_groups)


def test_outlier_share_helps() -> None:
    losses = {
        shares: sum(loss(seed, solved(seed, FISHER, Sum(Codebook(3), *shares))) for seed in range(3))
        for shares in [(0.004, 0.0005), (0.0, 0.0045), (0.002, 0.0)]
    }
    assert losses[0.004, 0.0005] < min(losses[0.0, 0.0045], losses[0.002, 0.0])


def test_levels_equal_brute_force() -> None:
    """Against every partition of a short row, before levels are rounded to fp16."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 1, 11, generator=draw), torch.rand(5, 1, 11, generator=draw).pow(3)
    ordered, order = x.double().sort(-1)
    ordered_weight = weight.double().gather(-1, order)
    best = torch.full((5,), torch.inf, dtype=torch.float64)
    for cuts in itertools.combinations(range(1, 11), 3):
        pieces = zip(ordered.tensor_split(cuts, -1), ordered_weight.tensor_split(cuts, -1), strict=True)
        costs = [(w * p * p).sum(-1) - (w * p).sum(-1).square() / w.sum(-1) for p, w in pieces]
        best = torch.minimum(best, sum(costs)[:, 0])
    format = Codebook(2)
    params = format.fit(x, weight)
    reached = ((x - format.decode(format.nearest(x, params), params)).square() * weight).sum(-1)[:, 0]
    torch.testing.assert_close(reached.double(), best, rtol=1e-3, atol=0)


def test_sparse_entry_choice() -> None:
    W, stats = layer(0)
    matrix = solved(0, FISHER, Sum(Codebook(3), outliers=0.004, sensitive=0.0005))
    rows, columns = module.places(matrix.params["sparse_counts"], matrix.params["sparse_columns"])
    assert len(rows) == round(0.004 * W.numel()) + round(0.0005 * W.numel())
    chosen = torch.zeros(W.shape, dtype=torch.bool)
    chosen[rows, columns] = True
    fisher, size = stats.fisher, W.abs()
    by_loss = chosen & (fisher >= fisher.flatten().topk(round(0.0005 * W.numel())).values[-1])
    assert int(by_loss.sum()) == round(0.0005 * W.numel())
    assert size[chosen & ~by_loss].min() >= size[~chosen].max()


def test_sparse_values() -> None:
    """The dense code in their places is that of 0, and the sum is the weight again."""
    W = layer(0)[0]
    matrix = solved(0, FISHER, Sum(Codebook(3)))
    rows, columns = module.places(matrix.params["sparse_counts"], matrix.params["sparse_columns"])
    table = matrix.params["table"][:, 0]
    nearest = table.gather(1, table.abs().argmin(1, keepdim=True))[:, 0]
    dense = Codebook(3).dequantize(matrix.codes, {"table": matrix.params["table"]}, matrix.shape)
    assert torch.equal(dense[rows, columns], nearest[rows])
    torch.testing.assert_close(matrix.dequantize()[rows, columns], W[rows, columns], rtol=1e-3, atol=1e-5)


def test_sparse_entries_excluded() -> None:
    """A sparse entry may have any size and any gradient."""
    W, stats = layer(0)
    other = W.clone()
    place = divmod(int(W.abs().argmax()), COLUMNS)
    other[place] = 50.0
    one, two = (solve(FISHER, w, stats, Sum(Codebook(3))).params["table"] for w in (W, other))
    assert torch.equal(one, two)


def test_bits_match_paper() -> None:
    """Table 1 has 3.02, 4.05 and 3.24, 4.27 with 32-bit columns; 16 bits are enough for 4096 columns."""
    shape = (4096, 4096)
    for bits, dense in ((3, 3.03), (4, 4.06)):
        assert Codebook(bits).stored_bits(shape) / 4096**2 == pytest.approx(dense, abs=0.01)
        assert Sum(Codebook(bits)).stored_bits(shape) / 4096**2 == pytest.approx(dense + 0.148, abs=0.01)


def correlated(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer, and Gram matrices of its inputs and of held-out ones."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(192) + 0.9 * torch.randn(192, 192, generator=draw) / 192**0.5
    X = torch.randn(4096, 192, generator=draw) @ mix * (0.7 * torch.randn(192, generator=draw)).exp()
    W = torch.randn(64, 192, generator=draw) / torch.randn(64, 192, 4, generator=draw).square().mean(-1).sqrt()
    return W, X[:2048].T @ X[:2048] / 2048, X[2048:].T @ X[2048:] / 2048


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("inner", [Codebook(3), Uniform(3, 64)], ids=repr)
def test_works_with_gptq(inner: Format, seed: int, monkeypatch) -> None:
    """Sparse entries next to a GPTQ matrix are refitted in the metric of the outputs."""
    W, gram, held_out = correlated(seed)

    def error(solver: Solver, format: Format) -> float:
        matrix = solve(solver, W, Statistics(gram, 2048), format)
        return output_error(W, matrix.dequantize(), held_out)

    both = error(GPTQ(), Sum(inner))
    assert both < 0.9 * error(GPTQ(), inner)
    assert both < 0.7 * error(Nearest(True, "diagonal"), Sum(inner))
    monkeypatch.setattr(module, "best_values", lambda E, gram, mask, damp: E[mask])
    assert both < error(GPTQ(), Sum(inner))


def test_zero_shares_is_dense() -> None:
    recipe = build_recipe("squeezellm", {"outliers": 0, "sensitive": 0})
    assert recipe.weight == Codebook(3)
    assert recipe.needs == {"fisher"}
    assert build_recipe("squeezellm", {"fisher": "false"}).needs == set()


@pytest.mark.parametrize("shares", [(0.0, 0.0), (-0.1, 0.2), (0.2, 0.2), (float("nan"), 0.1)])
def test_share_range(shares: tuple[float, float]) -> None:
    with pytest.raises(RecipeError, match="shares"):
        Sum(Codebook(3), *shares)


def test_nested_sums_refused() -> None:
    with pytest.raises(RecipeError, match="one"):
        Sum(Sum(Codebook(3)))
