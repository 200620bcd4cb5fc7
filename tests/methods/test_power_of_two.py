"""Powers of two (arXiv 2203.05025), their sums (APoT, 1909.13144) and powers of sqrt(2) (POST, 2504.17263)."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats import Format
from bitmill.formats.apot import AdditivePowersOfTwo
from bitmill.formats.power_of_two import PowerOfSqrtTwo, PowerOfTwo
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error
from helpers.cases import gram_of, inputs, weights


def gaussian() -> torch.Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02


def laplace() -> torch.Tensor:
    uniform = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    return -0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999))


def error(W: torch.Tensor, format: Format) -> float:
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, True)).dequantize()
    return float((W - decoded).square().sum() / W.square().sum())


@pytest.mark.parametrize("W", [gaussian(), laplace()], ids=["gaussian", "laplace"])
@pytest.mark.parametrize("group_size", [64, "row"])
def test_post_is_closer_than_powers_of_two(W, group_size):
    """The claim of POST, from 4 bits: half the distance of two levels."""
    for bits in (4, 5, 6):
        assert error(W, PowerOfSqrtTwo(bits, group_size)) < 0.6 * error(W, PowerOfTwo(bits, group_size))


@pytest.mark.parametrize("W", [gaussian(), laplace()], ids=["gaussian", "laplace"])
def test_post_is_behind_at_three_bits(W):
    """Not in the paper: three powers of sqrt(2) end at half of the largest level, and most weights are smaller."""
    assert error(W, PowerOfSqrtTwo(3, 64)) > 1.2 * error(W, PowerOfTwo(3, 64))


def test_more_bits_of_powers_of_two_do_not_help():
    """The rigid resolution of the APoT paper, section 2.1: it stays, and sums of powers go on."""
    W = gaussian()
    four, five, six = (error(W, PowerOfTwo(bits, 64)) for bits in (4, 5, 6))
    assert six > 0.99 * five > 0.98 * four
    sums = [error(W, AdditivePowersOfTwo(bits, 64)) for bits in (4, 5, 6)]
    assert sums[0] < 0.4 * four
    assert sums[2] < 0.5 * sums[1] < 0.25 * sums[0] * 2


def test_apot_against_uniform():
    """Their gain over uniform levels is small in the paper too: here at 4 bits alone, for heavy tails."""
    assert error(laplace(), AdditivePowersOfTwo(4, 64)) < error(laplace(), Uniform(4, 64, symmetric=True))
    assert error(gaussian(), AdditivePowersOfTwo(5, 64)) > error(gaussian(), Uniform(5, 64, symmetric=True))


@pytest.mark.parametrize("method", ["power_of_two", "post", "apot", "powerquant"])
def test_error_feedback_lowers_the_error_of_outputs(method):
    W, gram = weights(48, 96), gram_of(inputs())
    solved = {}
    for solver in ("nearest", "gptq"):
        recipe = build_recipe(method, {"bits": 3, "group_size": "row", "solver": solver})
        solved[solver] = recipe.solver.solve(W, Statistics(gram, 400), recipe.weight).dequantize()
    errors = {solver: output_error(W, W_hat, gram) for solver, W_hat in solved.items()}
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_logarithmic_rounding_costs_error_in_value():
    W = gaussian()
    errors = {}
    for rounding in ("value", "log"):
        recipe = build_recipe("power_of_two", {"rounding": rounding})
        W_hat = recipe.solver.solve(W, Statistics(), recipe.weight).dequantize()
        errors[rounding] = output_error(W, W_hat, None)
    assert errors["value"] < errors["log"] < 1.3 * errors["value"]


def test_stored_bits():
    for method in ("power_of_two", "post", "apot"):
        weight = build_recipe(method, {"group_size": "row"}).weight
        assert weight.stored_bits((64, 512)) / (64 * 512) == 4 + 16 / 512
