"""Laws of allocators, for every registered allocator."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from bitmill.allocators import ALLOCATORS, Choices
from bitmill.allocators.base import total_bits, total_cost
from bitmill.allocators.greedy import Greedy
from bitmill.errors import UsageError
from helpers.selection import thin

every_allocator = pytest.mark.parametrize("name", ALLOCATORS.names())


def units_of(seed: int, count: int = 5, choices: int = 4) -> list[Choices]:
    """Units of several sizes, whose costs fall with their bits, but for noise."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        weights, sensitivity = int(rng.integers(1, 9)) * 64, float(rng.lognormal())
        bits = tuple(weights * b for b in (2, 3, 4, 8)[:choices])
        costs = tuple(sensitivity * 4.0 ** -(b / weights) * float(rng.uniform(0.7, 1.3)) for b in bits)
        made.append(Choices(bits, costs))
    return made


def optimum(units: list[Choices], budget: int) -> float:
    every = itertools.product(*(range(len(unit.bits)) for unit in units))
    return min(total_cost(units, chosen) for chosen in every if total_bits(units, chosen) <= budget)


def budgets(units: list[Choices]) -> list[int]:
    least, most = (total_bits(units, [end] * len(units)) for end in (0, -1))
    return [int(least + (most - least) * share) for share in (0, 0.1, 0.45, 1)]


@every_allocator
@pytest.mark.parametrize("seed", thin([0, 1, 2], [0]))
def test_budget_and_optimum(name, seed):
    allocator, units = ALLOCATORS.get(name)(), units_of(seed)
    before = float("inf")
    for budget in budgets(units):
        chosen = allocator.allocate(units, budget)
        assert total_bits(units, chosen) <= budget
        cost, best = total_cost(units, chosen), optimum(units, budget)
        largest_step = max(max(unit.costs) - min(unit.costs) for unit in units)
        assert best - 1e-12 <= cost <= best + (1e-9 if allocator.exact else largest_step)
        assert not allocator.exact or cost <= before + 1e-12
        before = cost


@every_allocator
def test_too_small_a_budget_is_refused(name):
    units = units_of(0)
    with pytest.raises(UsageError, match="smallest choices"):
        ALLOCATORS.get(name)().allocate(units, budgets(units)[0] - 1)


@every_allocator
def test_deterministic(name):
    units = units_of(1, 20)
    budget = budgets(units)[2]
    assert ALLOCATORS.get(name)().allocate(units, budget) == ALLOCATORS.get(name)().allocate(units, budget)


@every_allocator
def test_degenerate_units(name):
    units = [Choices((8,), (1.0,)), Choices((8, 8, 4), (0.0, 0.0, 0.0)), Choices((2, 4), (3.0, 5.0))]
    assert ALLOCATORS.get(name)().allocate(units, 100) == [0, 2, 0]  # bits that save nothing are not spent


@every_allocator
def test_round_trip(name):
    allocator = ALLOCATORS.get(name)()
    assert ALLOCATORS.from_dict(json.loads(json.dumps(allocator.to_dict()))) == allocator


def test_greedy_without_filling_is_monotone():
    units = units_of(4, 30)
    least, most = (total_bits(units, [end] * len(units)) for end in (0, -1))
    costs = [total_cost(units, Greedy(fill=False).allocate(units, b)) for b in range(least, most, 997)]
    assert costs == sorted(costs, reverse=True)


def test_hull():
    unit = Choices((1, 2, 3, 4, 4), (10.0, 9.0, 2.0, 1.5, 3.0))
    assert unit.pareto() == [0, 1, 2, 3]
    assert unit.hull() == [0, 2, 3]
    with pytest.raises(ValueError, match="infinite"):
        Choices((1,), (float("nan"),))
