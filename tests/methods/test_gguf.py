"""The method gguf: types, and the type that takes over where columns are no whole blocks."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.gguf_types import GGUF_TYPES, gguf_type
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve
from helpers.cases import gram_of, inputs, weights


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "IQ4_XS"])
def test_feedback_beats_the_nearest(kind):
    recipe = build_recipe("gguf", {"type": kind})
    assert gguf_type(recipe.weight) == kind
    W, gram = weights(32, 512), gram_of(inputs(1500, 512))
    nearest = nearest_matrix(recipe.weight, W, fit_matrix(recipe.weight, W, gram.diagonal(), search=True))
    solved = solve(recipe.solver, W, Statistics(gram, 1500), recipe.weight)
    assert output_error(W, solved.dequantize(), gram) < 0.9 * output_error(W, nearest.dequantize(), gram)


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("Q2_K", "IQ4_NL"),
        ("Q3_K", "IQ4_NL"),
        ("IQ4_XS", "IQ4_NL"),
        ("Q4_K", "Q5_0"),
        ("Q5_K", "Q5_1"),
        ("Q6_K", "Q8_0"),
    ],
)
def test_other_columns(kind, instead):
    assert gguf_type(GGUF_TYPES[kind].for_columns(576)) == instead
    assert gguf_type(GGUF_TYPES[kind].for_columns(1536)) == kind
    assert gguf_type(GGUF_TYPES["Q4_0"].for_columns(576)) == "Q4_0"


def test_negative_side_of_a_table():
    """A group whose longest tail is positive gets a negative scale."""
    W = torch.tensor([[*torch.linspace(-0.5, 0.5, 31).tolist(), 4.0]])
    params = fit_matrix(GGUF_TYPES["Q4_0"], W, None, search=True)
    assert float(params["scale"]) < 0


def test_unknown_type():
    with pytest.raises(RecipeError, match="type is 'Q4_K_M'; use one of Q4_0"):
        build_recipe("gguf", {"type": "Q4_K_M"})
