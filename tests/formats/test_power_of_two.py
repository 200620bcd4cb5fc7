"""Powers of 2 and of sqrt(2), and sums of powers: the levels of the papers, decoded by shifts."""

from __future__ import annotations

import math

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.apot import AdditivePowersOfTwo
from bitmill.formats.power_of_two import PowerOfSqrtTwo, PowerOfTwo
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import nearest_in_log

ONE = {"scale": torch.ones(1, 1)}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(("kind", "base"), [(PowerOfTwo, 2.0), (PowerOfSqrtTwo, math.sqrt(2))])
def test_levels_are_those_of_the_formula(kind, base, bits):
    """2^bits different numbers: 0 and +-base^-k, k = 0 to 2^(bits - 1) - 2, and one more negative one."""
    levels = kind(bits, "tensor").levels(ONE)[0, 0].tolist()
    formula = [base**-k for k in range((1 << (bits - 1)) - 1)]
    more = base ** -len(formula)
    assert sorted(levels) == pytest.approx(sorted([0.0, *formula, *(-x for x in formula), -more]), rel=1e-6)
    assert len(set(levels)) == 1 << bits


def test_post_is_not_the_released_code():
    """There the base is 2 and 4 bits have 17 levels."""
    levels = PowerOfSqrtTwo(4, "tensor").levels(ONE)[0, 0]
    assert len(levels) == 16
    ratios = levels[1:8].sort(descending=True).values
    torch.testing.assert_close(ratios[:-1] / ratios[1:], torch.full((6,), math.sqrt(2)))


@pytest.mark.parametrize("bits", [3, 4])
def test_products_are_shifts(bits):
    """With integers scaled up by the longest shift, a product is a shift, exactly."""
    format, half = PowerOfTwo(bits, "tensor"), 1 << (bits - 1)
    x, longest = 1234567, half - 1
    for code, (level, shift) in enumerate(zip(format.levels(ONE)[0, 0].tolist(), format.shifts())):
        shifted = (x << longest) >> shift
        signed = 0 if code == 0 else -shifted if code >= half else shifted
        assert signed == x * level * 2**longest
        assert shift == longest - code % half


@pytest.mark.parametrize(
    ("bits", "terms"),
    [
        (3, [[1, 2, 3]]),
        (4, [[1, 2, 4], [3]]),
        (5, [[1, 3, 5], [2, 4, 6]]),
        (6, [[1, 3, 6], [2, 4, 7], [5]]),
        (7, [[1, 4, 7], [2, 5, 8], [3, 6, 9]]),
    ],
)
def test_sums_are_those_of_the_paper(bits, terms):
    sums = {0.0}
    for exponents in terms:
        sums = {a + p for a in sums for p in (0.0, *(2.0**-e for e in exponents))}
    levels = AdditivePowersOfTwo(bits, "tensor").levels(ONE)[0, 0]
    assert levels[: 1 << (bits - 1)].tolist() == sorted(sums)
    assert torch.equal(levels[1 << (bits - 1) :], -levels[: 1 << (bits - 1)])
    assert len(sums) == 1 << (bits - 1)


def test_rounding_rules_differ_in_their_thresholds():
    """Between 2^e and 2^(e + 1): 1.5 * 2^e in value, sqrt(2) * 2^e in log; half of the smallest power in both."""
    format = PowerOfTwo(4, "tensor")
    x = torch.tensor([1.45, 1.55, 1.40, 1.42, -1.45]) / 8
    x = torch.cat([x, torch.tensor([0.49, 0.51]) * 2**-6, torch.tensor([0.49, -0.51]) * 2**-7, torch.zeros(1)])
    by_value = format.decode(format.nearest(x.view(1, 1, -1), ONE), ONE).flatten() * 8
    by_log = format.decode(nearest_in_log(format, x.view(1, 1, -1), ONE), ONE).flatten() * 8
    assert by_value[:5].tolist() == [1, 2, 1, 1, -1]
    assert by_log[:5].tolist() == [2, 2, 1, 2, -2]
    small = [0, 2.0**-3, 0, -(2.0**-4), 0]
    assert by_value[5:].tolist() == by_log[5:].tolist() == small


def test_options_that_cannot_work_are_refused():
    with pytest.raises(RecipeError, match="2 to 6 bits"):
        PowerOfTwo(1)
    with pytest.raises(RecipeError, match="3 to 7 bits"):
        AdditivePowersOfTwo(2)
    with pytest.raises(RecipeError, match="solver=nearest"):
        build_recipe("power_of_two", {"solver": "gptq", "rounding": "log"})
    logarithms = build_recipe("power_of_two", {"rounding": "log"}).solver
    with pytest.raises(RecipeError, match="columns jointly"):
        Recipe("vectors", build_recipe("pvq").weight.core, logarithms)
