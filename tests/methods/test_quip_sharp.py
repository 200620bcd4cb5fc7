"""QuIP# (arXiv 2402.04396): a lattice beats single numbers, and blocks feed their error on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.codebook import Codebook
from bitmill.formats.e8 import E8
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.recipes.method import build_recipe
from bitmill.solvers.nearest import Nearest
from helpers.rotated_layers import held_out_error

SEEDS = [0, 1]


def test_beats_optimal_levels() -> None:
    """Section 4.2: 0.091 of the variance; Lloyd's levels, fitted to these very numbers, have 0.117."""
    W = torch.randn(64, 512)

    def error(format) -> float:
        solved = nearest_matrix(format, W, fit_matrix(format, W, None, True))
        return float((W - solved.dequantize()).square().mean())

    assert error(E8(2)) < 0.093
    assert error(Codebook(2, "tensor")) > 0.113


@pytest.mark.parametrize("seed", SEEDS)
def test_beats_scalar_methods(seed: int) -> None:
    ours = held_out_error(seed, "quip_sharp")
    assert ours < 0.85 * held_out_error(seed, "quip", bits=2, rotation="hadamard", column_passes=1)
    assert ours < 0.8 * held_out_error(seed, "gptq", bits=2, group_size=64)
    assert ours < held_out_error(seed, "gptqt", bits=2)
    stored, theirs = build_recipe("quip_sharp").default.format, build_recipe("gptqt", {"bits": 2}).default.format
    assert stored.stored_bits((1536, 1536)) < theirs.stored_bits((1536, 1536))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sides", ["both", "in"])
def test_feedback_beats_nearest(seed: int, sides: str) -> None:
    recipe = build_recipe("quip_sharp", {"sides": sides, "column_passes": 0})
    assert held_out_error(seed, recipe) < 0.7 * held_out_error(seed, dataclasses.replace(recipe, solver=Nearest()))


@pytest.mark.parametrize("seed", SEEDS)
def test_extra_pass_and_rotation_help(seed: int) -> None:
    recipe = build_recipe("quip_sharp")
    assert held_out_error(seed, recipe) < held_out_error(seed, "quip_sharp", column_passes=0)
    assert held_out_error(seed, recipe) < 0.8 * held_out_error(seed, dataclasses.replace(recipe, transforms=()))


def test_only_two_bits() -> None:
    assert build_recipe("quip_sharp").default.format.stored_bits((576, 1536)) == 576 * 1536 * 2 + 16
    with pytest.raises(RecipeError, match="2 bits"):
        E8(1)
