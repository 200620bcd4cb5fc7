"""Dynamic programming over sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import numpy as np

from bitmill.allocators.base import ALLOCATORS, Allocator, Choices, scaled_costs


@ALLOCATORS.register("dynamic_programming")
@dataclass(frozen=True)
class DynamicProgramming(Allocator):
    """The least cost of the first u units for every size, unit after unit.

    Sizes above those of the smallest choices are counted in their greatest common divisor, or where the budget has
    more than `steps` of those in a larger step, rounded up: the budget is kept, and the optimum is that of the
    rounded sizes.

    Attributes:
        steps: most sizes in the table.
    """

    exact: ClassVar[bool] = True  # as far as sizes are multiples of the step

    steps: int = 20_000

    def _allocate(self, units: Sequence[Choices], budget: int) -> list[int]:
        kept = [unit.pareto() for unit in units]
        more = [[unit.bits[j] - unit.bits[js[0]] for j in js] for unit, js in zip(units, kept)]
        left = budget - sum(unit.bits[js[0]] for unit, js in zip(units, kept))
        left = min(left, sum(bits[-1] for bits in more))
        step = max(reduce(math.gcd, (b for bits in more for b in bits), 0), 1)
        step *= max(1, -(-left // (step * self.steps)))
        sizes, width = [[-(-b // step) for b in bits] for bits in more], left // step + 1
        best = np.zeros(width)  # least cost with at most this size
        taken = []
        for costs, js, size in zip(scaled_costs(units), kept, sizes):
            options = np.full((len(js), width), np.inf)
            for row, j in enumerate(js):
                if size[row] < width:
                    options[row, size[row] :] = best[: width - size[row]] + costs[j]
            taken.append(options.argmin(0))
            best = options.min(0)
        chosen, place = [], width - 1
        for rows, js, size in zip(reversed(taken), reversed(kept), reversed(sizes)):
            row = int(rows[place])
            chosen.append(js[row])
            place -= size[row]
        return chosen[::-1]
