"""QuIP (arXiv 2307.13304): incoherence, LDLQ, and both at 2 bits."""

from __future__ import annotations

import dataclasses

import pytest
from torch import Tensor

from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.solvers.nearest import Nearest
from helpers.rotated_layers import held_out_error, layer

SEEDS = [0, 1]
ROTATIONS = ["orthogonal", "hadamard"]


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotated_weights_are_incoherent(rotation: str) -> None:
    """Definition 1 and lemma 5: max |W_ij| <= mu |W|_F / sqrt(rows columns) with a mu of logarithms."""
    W, gram, _ = layer(0)
    W[3, 5] = 3.0  # a hundred and fifty times the RMS
    rotated = build_recipe("quip", {"rotation": rotation}).default.format.reduce(W, Statistics(gram, 2048)).W
    assert standing_out(W) > 60
    assert standing_out(rotated) < 12


def standing_out(W: Tensor) -> float:
    """The mu of the paper's incoherence: the largest entry over the RMS."""
    return float(W.abs().max() / W.square().mean().sqrt())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("search", [True, False])
def test_beats_gptq_at_2_bits(seed: int, rotation: str, search: bool) -> None:
    ours = held_out_error(seed, "quip", bits=2, rotation=rotation)
    theirs = held_out_error(seed, "gptq", bits=2, group_size="row", search=search)
    assert ours < 0.95 * theirs


@pytest.mark.parametrize("seed", SEEDS)
def test_paper_setting_beats_gptq(seed: int) -> None:
    """2.4 RMS against min-max rows, neither searched."""
    ours = held_out_error(seed, "quip", bits=2, search=False)
    assert ours < 0.5 * held_out_error(seed, "gptq", bits=2, group_size="row", search=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ldlq_beats_nearest(seed: int, bits: int) -> None:
    """Theorem 1, in the rotated basis."""
    recipe = build_recipe("quip", {"bits": bits})
    nearest = Recipe("nearest", recipe.weight, Nearest(search=True), recipe.transforms)
    assert held_out_error(seed, recipe) < 0.7 * held_out_error(seed, nearest)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [2, 3])
def test_incoherence_helps(seed: int, bits: int) -> None:
    recipe = build_recipe("quip", {"bits": bits})
    assert held_out_error(seed, recipe) < 0.8 * held_out_error(seed, dataclasses.replace(recipe, transforms=()))


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_passes_help(seed: int) -> None:
    W, gram, _ = layer(seed)

    def objective(passes: int) -> float:
        recipe = build_recipe("quip", {"column_passes": passes})
        return output_error(
            W, solve(recipe.solver, W, Statistics(gram, 2048), recipe.default.format).dequantize(), gram
        )

    assert objective(2) < objective(1) < objective(0)


def test_stored_bits() -> None:
    assert build_recipe("quip").default.format.stored_bits((576, 1536)) == 576 * 1536 * 2 + 16
    assert (
        build_recipe("quip", {"rescale": True}).default.format.stored_bits((576, 1536))
        == 576 * 1536 * 2 + 16 + 1536 * 16
    )
