"""Logarithmic levels: the integer decoder, the code of 0, and the search of static parameters."""

from __future__ import annotations

import math

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats import FORMATS
from bitmill.formats.logarithm import LONGEST, AdaLog, Log2, LogSqrt2
from bitmill.formats.static_search import search_static
from bitmill.formats.uniform import Uniform
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import build_recipe

ONE = {"scale": torch.ones(1, 1), "zero": torch.zeros(1, 1)}


def with_base(q: float) -> dict[str, torch.Tensor]:
    return {**ONE, "base": torch.full((1, 1), q)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("q", [1, 10, 18, 37, 137, 255])
def test_integers_decode_exactly_as_the_formula(bits, q):
    format = AdaLog(bits, "tensor")
    levels = format.levels(with_base(q))[0, 0]
    multipliers, shifts = (table[0, 0].tolist() for table in format.integer_tables(with_base(q)))
    whole = format.multiplier
    for code in range((1 << bits) - 1):
        exponent, remainder = divmod(code * q, 37)
        rounded = round(whole * 2 ** (-remainder / 37))
        formula = 2.0**-exponent * (rounded / whole) if exponent <= LONGEST else 0.0
        assert levels[code] == torch.tensor(formula)
        fixed_point = (multipliers[code] << LONGEST) >> shifts[code]
        assert fixed_point == (rounded << LONGEST - exponent if exponent <= LONGEST else 0)
        assert levels[code] == torch.tensor(fixed_point / (whole * 2**LONGEST), dtype=torch.float64).float()
    assert levels[-1] == 0


def test_bases_of_the_others():
    assert torch.equal(Log2(3, "tensor").levels(ONE)[0, 0], torch.tensor([2.0**-k for k in range(7)] + [0.0]))
    levels = LogSqrt2(4, "tensor").levels(ONE)[0, 0]
    exact = torch.tensor([math.sqrt(0.5) ** k for k in range(15)])
    assert float(((levels[:-1] - exact) / exact).abs().max()) < 1 / 30


def test_powers_of_two_are_adalog_with_its_denominator_as_base():
    assert torch.equal(AdaLog(4, "tensor").levels(with_base(37)), Log2(4, "tensor").levels(ONE))


def test_search_prefers_the_base_that_numbers_have():
    values = AdaLog(4, "tensor").levels(with_base(23))[0, 0]
    x = values[torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0))]
    x[0, 0] = 1.0
    found = search_static(AdaLog(4, "tensor"), x)
    assert int(found["base"]) == 23
    assert float(found["scale"]) == pytest.approx(1.0, abs=2e-3)


def test_static_search_of_outputs_beats_the_largest_input():
    torch.manual_seed(0)
    x, W = torch.nn.functional.gelu(torch.randn(256, 24)), torch.randn(8, 24)
    x[0, 0] = 30.0  # an outlier, for which min-max would give up all others

    def error(format, params) -> float:
        grouped = x.view(1, 1, -1)
        rounded = format.decode(format.nearest(grouped, params), params).view_as(x)
        return float(((rounded - x) @ W.T).square().sum())

    for format in (Uniform(4, "tensor"), AdaLog(4, "tensor"), Log2(4, "tensor")):
        start = format.fit(x.view(1, 1, -1), torch.ones(1, 1, 1), search=False)
        assert error(format, search_static(format, x, W)) < error(format, start)
    adalog = error(AdaLog(4, "tensor"), search_static(AdaLog(4, "tensor"), x, W))
    assert adalog <= 1.001 * error(Log2(4, "tensor"), search_static(Log2(4, "tensor"), x, W))


def test_eight_bits_are_finer_than_four():
    x = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) ** 4

    def error(bits: int) -> float:
        format, flat = AdaLog(bits, "tensor"), x.view(1, 1, -1)
        params = search_static(format, x)
        return float((format.decode(format.nearest(flat, params), params) - flat).square().sum())

    assert error(8) < error(4) / 50


def test_sites_can_have_bits_of_their_own():
    recipe = build_recipe("adalog", {"bits": 8, "act_bits": 8, "log_bits": 3})
    assert recipe.attention.probabilities.bits == recipe.rules[0].inputs.format.bits == 3
    assert recipe.inputs.format.bits == recipe.weight.bits == 8


def test_search_needs_formats_of_single_numbers():
    with pytest.raises(RecipeError, match="search looks"):
        Inputs(FORMATS.get("pyramid")(4, "row"), search=True, simulated=True).around(Uniform(4))
    with pytest.raises(RecipeError, match="search looks"):
        Inputs(FORMATS.get("codebook")(4, "tensor"), static=True, search=True).around(Uniform(4))
