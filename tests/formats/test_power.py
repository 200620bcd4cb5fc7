"""Powers of integers as levels: exponents, searched without data, and safe for any numbers."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.power import LEAST, MOST, UNITS, Power
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from helpers.cases import weights


def error(format, W, search=True) -> float:
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, search)).dequantize()
    return float((decoded - W).square().sum() / W.square().sum())


def test_exponent_of_one_is_the_uniform_grid():
    params = {"scale": torch.rand(6, 2)}
    levels = Power(4, 40, exponent=1.0).levels({"scale": params["scale"] * 8})
    torch.testing.assert_close(levels, Uniform(4, 40, symmetric=True).levels(params))


def test_exponent_of_a_half_has_squares_as_levels():
    levels = Power(4, "tensor").levels({"scale": torch.full((1, 1), 64.0)})[0, 0]
    assert levels.tolist() == [-64, -49, -36, -25, -16, -9, -4, -1, 0, 1, 4, 9, 16, 25, 36, 49]


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("per", ["layer", "row"])
def test_search_finds_the_exponent_of_the_levels(per, exponent):
    """Numbers that are evenly spaced after the power are stored nearly exactly."""
    q = torch.randint(-7, 8, (6, 96), generator=torch.Generator().manual_seed(0))
    q[:, ::8] = 7
    W = q.sign() * (q.abs() / 8) ** (1 / exponent)
    params = fit_matrix(Power(4, 40, per=per), W, None, True)
    assert (params["exponent"] / UNITS == exponent).all()
    assert error(Power(4, 40, per=per), W) < 1e-6


def test_finer_exponents_are_not_worse():
    """A row's, a layer's, the network's: each in a few steps of a search, hence the tolerance."""
    torch.manual_seed(0)
    W = torch.randn(32, 512) * torch.logspace(-2, 0, 32)[:, None]
    W[16:] = W[16:] ** 3
    network = min(error(Power(4, 64, exponent=a), W) for a in (0.4, 0.5, 0.6, 0.75, 1.0))
    layer, row = error(Power(4, 64, per="layer"), W), error(Power(4, 64, per="row"), W)
    assert row < layer <= 1.01 * network


@pytest.mark.parametrize("per", ["layer", "row"])
def test_gradient_of_the_exponent(per):
    """NUPES: dW^/da = -W^ ln(|q| / 2^(bits - 1)) / a^2, 0 where q is 0."""
    format, W = Power(3, 40, per=per), weights()
    params = fit_matrix(format, W, None, True)
    codes = nearest_matrix(format, W, params).codes
    exponent = params["exponent"].clone().requires_grad_()
    direction = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    decoded = format.dequantize(codes, {**params, "exponent": exponent}, (6, 96))
    (decoded * direction).sum().backward()
    a, t = params["exponent"] / UNITS, (codes.float() - 4).abs() / 4
    each = -decoded.detach() * t.clamp(min=1e-6).log() / a.square() * direction / UNITS
    expected = each.sum(1, keepdim=True) if per == "row" else each.sum().view(1, 1)
    torch.testing.assert_close(exponent.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stored", [LEAST, 64, MOST])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e4])
def test_extreme_exponents_and_numbers_are_finite(stored, size):
    for bits in (2, 4, 8):
        format = Power(bits, 40, exponent=stored / UNITS, per="row")
        found = nearest_matrix(format, weights() * size, fit_matrix(format, weights() * size, None, False))
        assert torch.isfinite(found.dequantize()).all()
        assert torch.isfinite(format.levels({**found.params, "exponent": torch.zeros(6, 1)})).all()


def test_damaged_exponent_is_found():
    format = Power(3, 40, per="layer")
    sound = nearest_matrix(format, weights(), fit_matrix(format, weights(), None, True)).pack()
    assert format.damage_reason(sound, (6, 96)) is None
    damaged = {**sound, "exponent": torch.zeros_like(sound["exponent"])}
    assert format.damage_reason(damaged, (6, 96)) == f"its exponent is below {LEAST} units"


def test_options_that_cannot_work_are_refused():
    for exponent in (0.01, 2.5, float("nan")):
        with pytest.raises(RecipeError, match=r"use a number from 0\.125"):
            Power(4, exponent=exponent)
    with pytest.raises(RecipeError, match="per=layer"):
        Power(4, "tensor", per="row")
