"""A 0/1 integer programme, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitmill.allocators.base import ALLOCATORS, Allocator, Choices, scaled_costs, total_bits, total_cost
from bitmill.allocators.greedy import Greedy
from bitmill.errors import NumericsError


@ALLOCATORS.register("integer_programme")
@dataclass(frozen=True)
class IntegerProgramme(Allocator):
    """min sum c_uj x_uj  subject to  sum b_uj x_uj <= budget,  sum_j x_uj = 1,  x_uj in {0, 1}.

    Paper      HAWQ-V3 (arXiv 2011.10680), with the size as the only constraint

    Attributes:
        max_seconds: the search ends after this time with the best choice that it has found.
    """

    exact: ClassVar[bool] = True

    max_seconds: float = 60.0

    def _allocate(self, units: Sequence[Choices], budget: int) -> list[int]:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        kept = [unit.pareto() for unit in units]
        costs = np.concatenate([c[np.array(js)] for c, js in zip(scaled_costs(units), kept)])
        bits = np.concatenate([[unit.bits[j] for j in js] for unit, js in zip(units, kept)]).astype(np.float64)
        owner = np.repeat(np.arange(len(units)), [len(js) for js in kept])
        one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
        found = milp(
            costs,
            constraints=[
                LinearConstraint(csr_array(bits[None] / budget), ub=1.0),
                LinearConstraint(one_each, lb=1.0, ub=1.0),
            ],
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": self.max_seconds},
        )
        greedy = Greedy().allocate(units, budget)
        if found.x is None:
            if found.status != 1:  # the time is over
                raise NumericsError(f"The integer programme was not solved: {found.message}.")
            return greedy
        chosen = [js[int(found.x[owner == unit].argmax())] for unit, js in enumerate(kept)]
        # the solver's tolerance of a constraint is 1e-6, which may be some bits
        fits = total_bits(units, chosen) <= budget
        return chosen if fits and total_cost(units, chosen) <= total_cost(units, greedy) else greedy
