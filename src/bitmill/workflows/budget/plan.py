"""Choose a candidate for every unit, and describe the choice as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bitmill.allocators import Allocator, Choices
from bitmill.errors import UsageError
from bitmill.recipes.recipe import Recipe
from bitmill.sensitivities.candidate import KEYS_VALUES, Candidate
from bitmill.sensitivities.store import Costs
from bitmill.workflows.budget.problem import Problem, files_bytes
from bitmill.workflows.budget.recipe import plan_recipe

_TRIES = 20  # headers of files differ a little between plans


@dataclass(frozen=True)
class Plan:
    """A candidate for every unit.

    Attributes:
        name: for people.
        problem: the problem.
        chosen: name of a unit -> its candidate.
        predicted: sum of the costs; KL divergence in nats per token where the sensitivity estimates that.
    """

    name: str
    problem: Problem
    chosen: dict[str, Candidate]
    predicted: float

    @cached_property
    def recipe(self) -> Recipe:
        """The plan as a recipe."""
        return plan_recipe(self.problem, self.chosen)

    @cached_property
    def bits_per_weight(self) -> float:
        """Bits per weight of the linears of the blocks, those in float included."""
        return self.problem.block_bits(self.chosen) / self.problem.weights

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all files of weights."""
        return files_bytes(self.problem, self.recipe)

    @cached_property
    def memory_bytes(self) -> int:
        """Computed peak of a process at the budget's context; 0 for other budgets."""
        memory = self.problem.memory
        return 0 if memory is None else memory.needed(self.problem.bits(self.chosen) / 8)

    @cached_property
    def seconds(self) -> float:
        """Measured time of the linear layers of the blocks, with a budget of time; 0 for other budgets."""
        return self.problem.bits(self.chosen) / 1e9 if self.problem.budget.seconds is not None else 0.0

    @property
    def counted(self) -> float:
        """Size that the budget bounds: bytes, seconds or bits per weight."""
        if self.problem.budget.counts_files:
            return float(self.counted_bytes)
        return self.bits_per_weight if self.problem.budget.seconds is None else self.seconds

    @property
    def counted_bytes(self) -> int:
        """Bytes that a budget of bytes counts: of the process at its context, otherwise of the files."""
        return self.memory_bytes or self.size_bytes

    def describe(self) -> dict[str, Any]:
        """Return sizes and prediction as plain data."""
        return {
            "name": self.name,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "predicted_kl": self.predicted,
            **({} if self.problem.memory is None else {"memory_bytes": self.memory_bytes}),
            **({} if self.problem.budget.seconds is None else {"linear_time_s": self.seconds}),
        }


def solve_plan(
    name: str,
    problem: Problem,
    costs: Costs,
    allocator: Allocator,
    only: Candidate | None = None,
    limits: dict[str, set[str]] | None = None,
) -> Plan:
    """Return the plan of least cost within the budget.

    Args:
        name: of the plan.
        problem: the problem.
        costs: name of a unit -> key of a candidate -> cost.
        allocator: the allocator.
        only: one candidate for all units of blocks that no rule decides.
        limits: name of a unit -> keys of the candidates that it may have.

    Raises:
        UsageError: the smallest candidates exceed the budget.
    """
    options = {}
    for unit in problem.units:
        own = [*zip(problem.candidates[unit.name], problem.sizes[unit.name])]
        if only is not None and unit in problem.block_units and unit.name not in problem.pinned:
            own = [(candidate, bits) for candidate, bits in own if candidate == only]
        if limits is not None:
            own = [(candidate, bits) for candidate, bits in own if candidate.key in limits[unit.name]]
        options[unit.name] = own
    choices = [
        Choices(tuple(bits for _, bits in own), tuple(costs[name].get(c.key, 0.0) for c, _ in own))
        for name, own in options.items()
    ]
    if problem.budget.bits_per_weight is not None:
        limit = int(problem.budget.bits_per_weight * problem.weights)
        return _plan(name, problem, options, choices, allocator.allocate(choices, limit))
    if problem.budget.seconds is not None:
        limit = int(problem.budget.seconds * 10**9)
        return _plan(name, problem, options, choices, allocator.allocate(choices, limit))
    assert problem.budget.size_bytes is not None
    smallest = [choice.cheapest for choice in choices]
    least = _plan(name, problem, options, choices, smallest)
    if problem.memory is not None:
        limit = 8 * problem.memory.room(problem.budget.size_bytes)
    else:
        fixed = 8 * least.size_bytes - sum(choice.bits[j] for choice, j in zip(choices, smallest))
        limit = 8 * problem.budget.size_bytes - fixed
    for _ in range(_TRIES):
        plan = _plan(name, problem, options, choices, allocator.allocate(choices, limit))
        over = plan.counted_bytes - problem.budget.size_bytes
        if over <= 0:
            return plan
        limit -= 8 * over
    raise UsageError(f"No plan was found within {problem.budget.text}; raise the budget a little.")


def smallest_plan(problem: Problem) -> Plan:
    """Return the plan of the smallest candidates."""
    chosen = {unit.name: problem.candidates[unit.name][0] for unit in problem.units}
    return Plan("smallest", problem, chosen, 0.0)


def uniform_plans(problem: Problem, costs: Costs, allocator: Allocator) -> list[Plan]:
    """Return the plans within the budget of one candidate in all units of the blocks, the best predicted first.

    A sensitivity that errs puts the wrong one first, so that the largest one is always among the first two.
    """
    free = [unit for unit in problem.block_units if unit.name not in problem.pinned]
    plans = []
    for candidate in problem.candidates[free[0].name] if free else ():
        if candidate.scheme is None:
            continue
        try:
            plans.append(solve_plan(f"uniform {candidate.label}", problem, costs, allocator, candidate))
        except UsageError:  # too large
            continue
    plans.sort(key=lambda plan: plan.predicted)
    if len(plans) > 2:
        largest = max(plans[1:], key=lambda plan: plan.bits_per_weight)
        plans = [plans[0], largest, *(plan for plan in plans[1:] if plan is not largest)]
    return plans


def describe_kinds(problem: Problem, costs: Costs, plan: Plan) -> list[dict[str, Any]]:
    """Return for each kind of unit its mean cost at each candidate and the candidates that were chosen.

    Args:
        problem: the problem.
        costs: name of a unit -> key of a candidate -> cost.
        plan: the plan.

    Returns:
        Of each kind `name`, `units`, `weights`, `costs` (label -> mean cost) and `chosen` (label -> units).
    """
    kinds: dict[str, dict[str, Any]] = {}
    sizes = {site.layer: site.shape[0] * site.shape[1] for site in problem.streamed.all_sites()}
    for unit in problem.units:
        prefix = f"{problem.streamed.block_name(unit.block)}." if unit.block >= 0 else ""
        name = "keys and values" if unit.block == KEYS_VALUES else unit.name.removeprefix(prefix)
        kind = kinds.setdefault(name, {"units": 0, "weights": 0, "costs": Counter(), "chosen": Counter()})
        kind["units"] += 1
        kind["weights"] += sum(sizes.get(layer, 0) for layer in unit.layers)
        kind["chosen"][plan.chosen[unit.name].label] += 1
        for candidate in problem.candidates[unit.name]:
            kind["costs"][candidate.label] += costs[unit.name].get(candidate.key, 0.0)
    return [
        {
            "name": name,
            "units": kind["units"],
            "weights": kind["weights"],
            "costs": {label: cost / kind["units"] for label, cost in kind["costs"].items()},
            "chosen": dict(kind["chosen"].most_common()),
        }
        for name, kind in kinds.items()
    ]


def describe_memory(plan: Plan) -> dict[str, int]:
    """Return the bytes of the process at the context: the parts that no choice changes, and those of the plan."""
    problem, memory = plan.problem, plan.problem.memory
    assert memory is not None
    at = {unit.name: problem.candidates[unit.name].index(plan.chosen[unit.name]) for unit in problem.units}
    cached = sum(problem.sizes[unit.name][at[unit.name]] for unit in problem.kv_units)
    parts = ("program", "activations", "attention", "others")
    return {
        **{name: getattr(memory, name) for name in parts},
        "layers": (problem.bits(plan.chosen) - cached) // 8,
        "keys_values": cached // 8,
    }


def describe_blocks(plan: Plan) -> list[float]:
    """Return the bits per weight of every block."""
    problem, bits, weights = plan.problem, Counter[int](), Counter[int]()
    sizes = {site.layer: site.shape[0] * site.shape[1] for site in problem.streamed.all_sites()}
    for unit in problem.block_units:
        bits[unit.block] += problem.stored_bits(unit, plan.chosen[unit.name])
        weights[unit.block] += sum(sizes[layer] for layer in unit.layers)
    return [bits[index] / weights[index] for index in sorted(bits)]


def _plan(
    name: str,
    problem: Problem,
    options: dict[str, list[tuple[Candidate, int]]],
    choices: list[Choices],
    at: list[int],
) -> Plan:
    chosen = {unit: own[j][0] for (unit, own), j in zip(options.items(), at)}
    return Plan(name, problem, chosen, float(sum(choice.costs[j] for choice, j in zip(choices, at))))
