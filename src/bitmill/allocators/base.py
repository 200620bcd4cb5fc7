"""The contract of an allocator: one choice for every unit, of least total cost, whose sizes fit a budget.

A unit is a set of layers that have one format, such as those that engines fuse. Its choices have a size in bits
and a cost, such as the predicted KL divergence; costs of units add up.

Laws (tests/conformance/test_allocators.py): the budget is kept; the result is deterministic; the layers of a unit
have one choice, as the unit has one; an exact allocator finds the optimum of enumeration, and more bits never cost
more; any other is above the optimum by at most the largest difference between two costs of one unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bitmill.config.registry import Member, Registry
from bitmill.errors import UsageError

ALLOCATORS: Registry[type[Allocator]] = Registry("allocator", "bitmill.allocators")


@dataclass(frozen=True)
class Choices:
    """The choices of one unit.

    Attributes:
        bits: size of each choice, in bits.
        costs: cost of each choice, finite.
    """

    bits: tuple[int, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.bits or len(self.bits) != len(self.costs):
            raise ValueError(f"{len(self.bits)} sizes and {len(self.costs)} costs are no choices")
        if not np.isfinite(self.costs).all():
            raise ValueError("a cost is NaN or infinite")

    @property
    def cheapest(self) -> int:
        """Index of the smallest choice; of equal sizes that of the least cost."""
        return min(range(len(self.bits)), key=lambda j: (self.bits[j], self.costs[j]))

    def pareto(self) -> list[int]:
        """Return the choices that no other is as good as in both size and cost, by rising size."""
        order = sorted(range(len(self.bits)), key=lambda j: (self.bits[j], self.costs[j]))
        kept: list[int] = []
        for j in order:
            if not kept or self.costs[j] < self.costs[kept[-1]]:
                kept.append(j)
        return kept

    def hull(self) -> list[int]:
        """Return the choices on the lower convex hull of size and cost, by rising size."""
        hull: list[int] = []
        for j in self.pareto():
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-2], j):
                hull.pop()
            hull.append(j)
        return hull

    def gain(self, smaller: int, larger: int) -> float:
        """Return the cost that a larger choice saves per bit."""
        return (self.costs[smaller] - self.costs[larger]) / (self.bits[larger] - self.bits[smaller])

    def _slope(self, a: int, b: int) -> float:
        return self.gain(a, b)


@dataclass(frozen=True)
class Allocator(Member, ABC):
    """Base of all allocators: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Allocator]]] = ALLOCATORS
    exact: ClassVar[bool] = False  # finds the optimum

    def allocate(self, units: Sequence[Choices], budget: int) -> list[int]:
        """Return the index of the choice of each unit.

        Args:
            units: the choices of each unit.
            budget: bits of all units together.

        Raises:
            UsageError: even the smallest choices need more.
        """
        least = sum(unit.bits[unit.cheapest] for unit in units)
        if least > budget:
            raise UsageError(
                f"The smallest choices need {least:,} bits and the budget has {budget:,}; raise the budget."
            )
        chosen = self._allocate(units, budget)
        assert total_bits(units, chosen) <= budget, self.name
        return chosen

    @abstractmethod
    def _allocate(self, units: Sequence[Choices], budget: int) -> list[int]:
        """Return the index of the choice of each unit; the smallest choices fit the budget."""


def total_bits(units: Sequence[Choices], chosen: Sequence[int]) -> int:
    """Return the bits of all units together."""
    return sum(unit.bits[j] for unit, j in zip(units, chosen))


def total_cost(units: Sequence[Choices], chosen: Sequence[int]) -> float:
    """Return the cost of all units together."""
    return float(np.sum([unit.costs[j] for unit, j in zip(units, chosen)]))


def scaled_costs(units: Sequence[Choices]) -> list[npt.NDArray[np.float64]]:
    """Return the costs of each unit above its least one, in units of the largest of all: from 0 to 1."""
    above = [np.asarray(unit.costs) - min(unit.costs) for unit in units]
    largest = max((float(costs.max()) for costs in above), default=0.0)
    return [costs / largest if largest > 0 else costs for costs in above]
