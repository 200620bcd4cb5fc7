"""PowerQuant (arXiv 2301.09858) and exponents of layers (NUPES, 2308.05600): claims on seeded weights."""

from __future__ import annotations

import itertools

import pytest
import torch

import bitmill
from bitmill.formats import Format
from bitmill.formats.power import Power
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from helpers.tiny_models import tiny_model


def bell(degrees: int) -> torch.Tensor:
    """Student t, scaled as weights; normal for many degrees of freedom."""
    draw = torch.Generator().manual_seed(degrees)
    chi = torch.randn(32, 512, degrees, generator=draw).square().sum(-1)
    return torch.randn(32, 512, generator=draw) * 0.02 * (degrees / chi).sqrt()


def error(W: torch.Tensor, format: Format, search: bool = True) -> float:
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, search)).dequantize()
    return float((W - decoded).square().sum() / W.square().sum())


@pytest.mark.parametrize("degrees", [5, 60])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_powers_are_closer_than_a_uniform_grid(degrees, bits):
    """The claim: at equal bits, a scale a row each."""
    W = bell(degrees)
    assert error(W, Power(bits, "row", per="layer")) < error(W, Uniform(bits, "row", symmetric=True))


def test_the_error_has_one_minimum():
    """Section 3.2: locally convex in the exponent, with one solution; with largest weights as scales."""
    W = bell(60)
    errors = [error(W, Power(4, "row", exponent=a / 16), search=False) for a in range(4, 21)]
    falls = [b < a for a, b in itertools.pairwise(errors)]
    assert falls == sorted(falls, reverse=True)
    assert True in falls
    assert False in falls


def test_heavier_tails_have_smaller_exponents():
    found = [float(fit_matrix(Power(4, "row", per="layer"), bell(d), None, True)["exponent"]) for d in (3, 60)]
    assert found[0] < found[1] <= 128


def test_exponent_of_a_network():
    """Section 3.2: that of least error of all weights together, between those of two kinds of layers."""
    layers = [bell(3), bell(60)]
    kinds = [Power(4, "row", 0.0).of_network(lambda W=W: [W]).exponent for W in layers]
    assert kinds[0] < kinds[1]
    assert kinds[0] <= Power(4, "row", 0.0).of_network(lambda: layers).exponent <= kinds[1]
    assert Power(4, "row", 0.5).of_network(lambda: layers).exponent == 0.5


def test_network_exponent_is_stored_in_the_recipe():
    model = tiny_model("llama")
    outcome = bitmill.quantize(model, "powerquant", per="network", measure=0, progress=False)
    exponent = outcome.report["recipe"]["weight"]["exponent"]
    assert 0.5 < exponent < 1.3


def test_network_exponent_is_the_option():
    recipe = build_recipe("powerquant", {"per": "network", "exponent": 0.625})
    assert recipe.weight == Power(4, 64, exponent=0.625)
    assert recipe.weight.stored_bits((64, 512)) / (64 * 512) == 4 + 16 / 64
