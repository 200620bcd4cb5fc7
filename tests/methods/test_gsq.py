"""GSQ on the blocks of a tiny model: below gptq on the identical grid."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.codebook import Codebook
from bitmill.formats.e8 import E8
from bitmill.formats.uniform import Uniform
from bitmill.numerics.statistics import Statistics
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.tuners.gsq import GSQ, RelaxedMatrix
from helpers.cases import weights
from helpers.tuned_blocks import quantized, quantized_by

GRID = {"bits": 2, "group_size": 16, "symmetric": True}
LONG = GSQ(epochs=4, tokens=128)


def test_below_gptq_on_its_grid():
    blocks, divergence = quantized_by(build_recipe("gsq", {**GRID, "epochs": 8, "tokens": 128}))
    assert divergence < 0.8 * quantized_by(build_recipe("gptq", GRID))[1]
    assert {layer.quantized.format for layer in blocks[0].layers.values()} == {Uniform(**GRID)}


@pytest.mark.parametrize("options", [{"neighbours": 2}, {"neighbours": 4}, {"noise": 0.3}], ids=repr)
def test_choices(options):
    tuner = dataclasses.replace(LONG, **options)
    assert quantized(tuner, solver=GPTQ())[1] < quantized(solver=GPTQ())[1]


def test_tables_of_any_levels():
    assert quantized(LONG, format=Codebook(2))[1] < quantized(format=Codebook(2))[1]


@pytest.mark.parametrize("format", [Uniform(2, 40), Uniform(3, 40, symmetric=True), Uniform(1, 40)], ids=repr)
@pytest.mark.parametrize("neighbours", [2, 3])
def test_cold_choice_is_the_start(format, neighbours):
    """Before any step the likeliest levels are those of the solver, and a cold mixture is what is stored."""
    W = weights()
    start = Nearest(search=True).solve(W, Statistics(), format)
    matrix = RelaxedMatrix(W, start, neighbours, 0.0, torch.Generator())
    assert torch.equal(matrix.quantized().codes, start.codes)
    matrix.temperature = 1e-4
    assert torch.allclose(matrix(), start.dequantize(), atol=1e-3)


def test_formats_without_levels_refused():
    with pytest.raises(RecipeError, match="scalar format"):
        Recipe("test", E8(2), Nearest(), tuners=(GSQ(),))
