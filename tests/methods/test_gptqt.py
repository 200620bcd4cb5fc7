"""GPTQT (arXiv 2407.02891): the claims of the abstract, on seeded layers with correlated inputs."""

import dataclasses

import pytest
import torch

from bitmill.formats import Format
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.integer_coding import IntegerCoding
from bitmill.formats.quantized import fit_matrix
from bitmill.formats.uniform import Uniform
from bitmill.numerics.codings import enumerate_codings, levels_of
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Solver, Statistics
from bitmill.solvers.alternating import Alternating
from bitmill.solvers.base import output_error
from bitmill.solvers.gptq import GPTQ

COLUMNS = 192


def layer(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heavy-tailed weights, and Gram matrices of training and of held-out inputs with large channels."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS) + 0.9 * torch.randn(COLUMNS, COLUMNS, generator=draw) / COLUMNS**0.5
    channel_scale = (0.7 * torch.randn(COLUMNS, generator=draw)).exp()
    X = torch.randn(4096, COLUMNS, generator=draw) @ mix * channel_scale
    W = torch.randn(64, COLUMNS, generator=draw)
    W = 0.02 * W / torch.randn(64, COLUMNS, 5, generator=draw).square().mean(-1).sqrt()
    return W, X[:2048].T @ X[:2048] / 2048, X[2048:].T @ X[2048:] / 2048


def held_out_error(seed: int, solver: Solver, format: Format) -> float:
    W, gram, held_out = layer(seed)
    return output_error(
        W, solver.solve(W, Statistics(gram, 2048, torch.zeros_like(gram)), format).dequantize(), held_out
    )


def recipe_error(seed: int, bits: int, **options: object) -> float:
    recipe = build_recipe("gptqt", {"bits": bits, **options})
    return held_out_error(seed, recipe.solver, recipe.weight)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_beats_gptq(bits: int, seed: int, act_order: bool, search: bool) -> None:
    ours, theirs = build_recipe("gptqt", {"bits": bits}), Uniform(bits, 64)
    model = (1536, 1536)  # a realistic width: the row's scale is spread over its columns
    assert ours.weight.stored_bits(model) <= theirs.stored_bits(model)
    assert recipe_error(seed, bits) < held_out_error(seed, GPTQ(act_order=act_order, search=search), theirs)


@pytest.mark.parametrize("bits", [2, 3])
def test_beats_binary_coding(bits: int) -> None:
    """Far below alternating coding without feedback, and below it inside the same loop."""
    ours, theirs = build_recipe("gptqt", {"bits": bits}), BinaryCoding(bits, 32 * bits * 2)
    assert ours.weight.stored_bits((1536, 1536)) <= 1.01 * theirs.stored_bits((1536, 1536))
    error = recipe_error(0, bits)
    assert error < 0.5 * held_out_error(0, Alternating(), theirs)
    assert error < 0.9 * held_out_error(0, ours.solver, theirs)


@pytest.mark.parametrize("bits", [2, 3])
def test_weight_error_alone_overfits(bits: int) -> None:
    """The abstract's motive: more weight error, less output error than alternating least squares."""
    W, gram, held_out = layer(0)
    recipe = build_recipe("gptqt", {"bits": bits})
    ours = recipe.solver.solve(W, Statistics(gram, 2048, torch.zeros_like(gram)), recipe.weight).dequantize()
    alternating = Alternating().solve(W, Statistics(), recipe.weight).dequantize()
    assert output_error(W, ours, None) > output_error(W, alternating, None)
    assert output_error(W, ours, held_out) < output_error(W, alternating, held_out)


@pytest.mark.parametrize("bits", [2, 3])
def test_each_ingredient_helps(bits: int) -> None:
    """Second step (a choice of codings), re-explored scale, and passes, one taken away at a time."""
    full = [recipe_error(seed, bits) for seed in (0, 1, 2)]
    for options in (
        {"codings": 1, "scale_bits": 8, "scale_step": 0.05},
        {"search": "false"},
        {"group_passes": 0, "column_passes": 0},
    ):
        without = [recipe_error(seed, bits, **options) for seed in (0, 1, 2)]
        assert sum(full) < sum(without), options


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_merges_to_binary_coding(bits: int) -> None:
    """Both steps become one binary coding, bit by bit."""
    format = IntegerCoding(bits, 32)
    params = fit_matrix(format, layer(0)[0], None, True)
    merged = BinaryCoding(bits, 32, offset=True).levels(format.merged(params))
    assert torch.equal(merged.float(), format.levels(params))


@pytest.mark.parametrize(
    ("grid_bits", "bits", "count"), [(3, 2, 34), (4, 2, 308), (5, 2, 2600), (4, 3, 441), (5, 3, 7225)]
)
def test_number_of_codings(grid_bits: int, bits: int, count: int) -> None:
    codings = enumerate_codings(grid_bits, bits)
    assert len(codings) == count == len(set(map(tuple, codings.tolist())))
    levels = levels_of(codings)
    assert levels.min() == -(2 ** (grid_bits - 1))
    assert levels.max() == 2 ** (grid_bits - 1) - 1


def test_search_equals_brute_force() -> None:
    """Histogram search finds what trying every exponent and coding on the floats finds."""
    format = IntegerCoding(2, 32, codings=8)
    x = layer(0)[0][:6, :64].reshape(6, 2, 32)
    importance = torch.rand(1, 2, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    found = format.fit(x, importance)
    error = ((x - format.decode(format.nearest(x, found), found)) ** 2 * importance).sum(-1)
    best = torch.full_like(error, torch.inf)
    for exponent in range(8):
        for coding in range(8):
            trial = {
                **found,
                "exponent": torch.full((6, 2), float(exponent)),
                "coding": torch.full((6, 2), float(coding)),
            }
            trial_error = ((x - format.decode(format.nearest(x, trial), trial)) ** 2 * importance).sum(-1)
            best = torch.minimum(best, trial_error)
    torch.testing.assert_close(error, best, rtol=1e-4, atol=0)


def test_storage_per_group() -> None:
    format = IntegerCoding(3, 32)
    assert format.stored_bits((64, 512)) == 64 * (512 * 3 + 512 // 32 * 8 + 16)
    assert dataclasses.replace(format, codings=1).stored_bits((64, 512)) == 64 * (512 * 3 + 512 // 32 * 3 + 16)
