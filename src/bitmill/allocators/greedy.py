"""Greedy steps along the convex hulls of size and cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from bitmill.allocators.base import ALLOCATORS, Allocator, Choices


@ALLOCATORS.register("greedy")
@dataclass(frozen=True)
class Greedy(Allocator):
    """From the smallest choices, take the step on a hull that saves most cost per bit, until one does not fit.

    The choices after every step are optimal for their own size, as the hulls are convex. Steps that fit behind the
    first one that does not are taken too, with `fill`; then more bits may, rarely, cost more.

    Attributes:
        fill: take later steps that still fit.
    """

    fill: bool = True

    def _allocate(self, units: Sequence[Choices], budget: int) -> list[int]:
        hulls = [unit.hull() for unit in units]
        at, left = [0] * len(units), budget - sum(unit.bits[hull[0]] for unit, hull in zip(units, hulls))
        steps = [(-units[u].gain(hull[0], hull[1]), u) for u, hull in enumerate(hulls) if len(hull) > 1]
        heapq.heapify(steps)
        while steps:
            _, u = heapq.heappop(steps)
            unit, hull = units[u], hulls[u]
            here, there = hull[at[u]], hull[at[u] + 1]
            needed = unit.bits[there] - unit.bits[here]
            if needed > left:
                if not self.fill:
                    break
                continue  # larger steps of this unit do not fit either
            at[u], left = at[u] + 1, left - needed
            if at[u] + 1 < len(hull):
                heapq.heappush(steps, (-unit.gain(hull[at[u]], hull[at[u] + 1]), u))
        return [hull[position] for hull, position in zip(hulls, at)]
