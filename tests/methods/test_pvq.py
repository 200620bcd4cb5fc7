"""PVQ (arXiv 2410.16926): close to the bound without any codebook."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.recipes.method import build_recipe
from bitmill.solvers.nearest import Nearest
from helpers.rotated_layers import held_out_error

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # of a standard normal number, by bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_beats_optimal_levels(bits: int) -> None:
    """On Gaussian weights, even against single numbers at as many bits as the length takes besides."""
    W = torch.randn(64, 576)
    format = Pyramid(bits)
    solved = nearest_matrix(format, W, fit_matrix(format, W, None, False))
    error = float((W - solved.dequantize()).square().mean())
    same_bits = LLOYD_MAX[bits] * (LLOYD_MAX[min(bits + 1, 4)] / LLOYD_MAX[bits]) ** 0.25
    assert error < LLOYD_MAX[bits]
    if bits > 1:
        assert error < same_bits
    assert error > 2.0 ** (-2 * (bits + 0.25))  # the rate-distortion bound


def test_stored_bits() -> None:
    stored = build_recipe("pvq").default.format
    assert stored.stored_bits((576, 1536)) == 576 * (1536 * 3.25 + 16)
    assert {part.name for part in stored.parts((576, 1536))} == {"scale"}
    assert [build_recipe("pvq", {"bits": b}).default.format.stored_bits((64, 512)) for b in (1, 2, 4)] == [
        64 * (512 * (b + 0.25) + 16) for b in (1, 2, 4)
    ]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", [2, 3])
def test_beats_gptq_and_gptqt(bits: int, seed: int) -> None:
    ours = held_out_error(seed, "pvq", bits=bits)
    assert ours < 0.8 * held_out_error(seed, "gptq", bits=bits, group_size=64)
    assert ours < 0.95 * held_out_error(seed, "gptqt", bits=bits)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sides", ["both", "in"])
def test_feedback_beats_nearest(seed: int, sides: str) -> None:
    recipe = build_recipe("pvq", {"sides": sides, "column_passes": 0})
    assert held_out_error(seed, recipe) < 0.7 * held_out_error(seed, dataclasses.replace(recipe, solver=Nearest()))


@pytest.mark.parametrize("seed", [0, 1])
def test_rotation_helps(seed: int) -> None:
    recipe = build_recipe("pvq")
    assert held_out_error(seed, recipe) < 0.9 * held_out_error(seed, dataclasses.replace(recipe, transforms=()))
