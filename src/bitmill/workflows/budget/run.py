"""From a budget to a recipe: measure sensitivities, solve, verify on held-apart windows, correct, roll back."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bitmill.allocators import ALLOCATORS, Allocator
from bitmill.calibration.token_windows import JobData, token_windows
from bitmill.checkpoint.overwrite import check_output
from bitmill.config.parsing import parse_part
from bitmill.data.held_apart import hold_apart
from bitmill.data.text import windows_hash
from bitmill.data.windows import CalibrationData
from bitmill.errors import UsageError
from bitmill.evaluation.context import context_length
from bitmill.files import write_text
from bitmill.kv.config import KVConfig
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.inputs import statistics_store
from bitmill.pipeline.job import Propagate
from bitmill.progress import Progress
from bitmill.recipes.compose import HeadBits
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.recipes.rules import Rule
from bitmill.report.budget import budget_text
from bitmill.sensitivities import SENSITIVITIES, Sensitivity
from bitmill.sensitivities.base import Run
from bitmill.sensitivities.candidate import Unit
from bitmill.sensitivities.ends import measure_ends
from bitmill.sensitivities.inputs import measure_inputs
from bitmill.sensitivities.keys_values import measure_keys_values, pairs_of
from bitmill.sensitivities.kl import KL
from bitmill.sensitivities.measure import complete_costs, measure_blocks
from bitmill.sensitivities.store import Costs
from bitmill.sources.cache import cache_folder
from bitmill.sources.open import open_source
from bitmill.workflows.budget.candidates import METHODS_BY_DEFAULT
from bitmill.workflows.budget.correct import corrected_plan
from bitmill.workflows.budget.keys_values import KV_BASE
from bitmill.workflows.budget.latency import LatencyTable
from bitmill.workflows.budget.measure import check_model, measure_units
from bitmill.workflows.budget.peak import measured_peak
from bitmill.workflows.budget.plan import (
    Plan,
    describe_blocks,
    describe_kinds,
    describe_memory,
    smallest_plan,
    solve_plan,
    uniform_plans,
)
from bitmill.workflows.budget.problem import Problem, build_problem, check_feasible
from bitmill.workflows.budget.recipe import readable_yaml
from bitmill.workflows.budget.size import Budget, parse_budget
from bitmill.workflows.budget.verify import Verifier
from bitmill.workflows.prepare import PreparedJob, QuantizeRequest
from bitmill.workflows.probe import short_trial
from bitmill.workflows.ray_tasks import check_address

SENSITIVITY, ALLOCATOR = "noise", "integer_programme"
UNIFORMS = 2  # uniform plans that are measured
_APART = 16  # most windows that are held apart: an eighth of them all
_SCALE_BLOCKS = 2  # blocks in which the scale of costs is measured that are not in nats
_LEAST_SECONDS = 60.0
_TRIAL_BLOCKS = 12  # models of fewer blocks are measured in full without a limit


@dataclass(frozen=True)
class BudgetRequest:
    """The arguments of `quantize` about a budget.

    Attributes:
        budget: as the user wrote it.
        methods: names of methods, recipe files or recipes to choose from.
        sensitivity, allocator: names, or parts `NAME:key=value,...`.
        max_minutes: about the longest time of the sensitivities; None for twice that of quantizing.
        corrections: corrections of the plan.
        save_recipe: a file for the recipe.
        ray: address of a Ray cluster that measures sensitivities; None for this process.
    """

    budget: str
    methods: Sequence[str | Recipe] = METHODS_BY_DEFAULT
    sensitivity: str = SENSITIVITY
    allocator: str = ALLOCATOR
    max_minutes: float | None = None
    corrections: int = 1
    save_recipe: Path | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.max_minutes is not None and not (self.max_minutes >= 0 and math.isfinite(self.max_minutes)):
            raise UsageError(f"max_minutes is {self.max_minutes!r}; use 0 or a positive number of minutes.")
        if not 0 <= self.corrections <= 2:
            raise UsageError(f"corrections is {self.corrections}; use 0, 1 or 2.")
        check_address(self.ray)


@dataclass(frozen=True)
class BudgetResult:
    """The recipe of a budget.

    Attributes:
        recipe: the recipe to write.
        summary: why, as plain data.
        held_apart: windows that must not calibrate.
    """

    recipe: Recipe
    summary: dict[str, Any]
    held_apart: int


def held_apart_windows(count: int) -> int:
    """Return the number of windows, of `count`, that verify plans and calibrate nothing."""
    return max(1, min(_APART, count // 8))


def recipe_for_budget(
    request: QuantizeRequest, asked: BudgetRequest, rules: Sequence[str | Rule], head_bits: HeadBits | None
) -> BudgetResult:
    """Choose the recipe of a budget.

    Args:
        request: the arguments of `quantize`.
        asked: those about the budget.
        rules, head_bits: as for `quantize`; they decide their layers.

    Raises:
        BitmillError: in one sentence, before any work where the arguments are wrong.
    """
    budget = parse_budget(asked.budget)
    if asked.ray is not None:
        check_model(request)
    kv_base = _kv_base(request.kv, budget)
    sensitivity: Sensitivity = SENSITIVITIES.from_dict(parse_part(SENSITIVITIES, asked.sensitivity))
    allocator: Allocator = ALLOCATORS.from_dict(parse_part(ALLOCATORS, asked.allocator))
    if request.statistics is not None and request.propagate != "float":
        raise UsageError("Statistics are the float model's; use propagate=float with them, or leave them out.")
    if request.out is not None and not request.resume and not request.dry_run:
        check_output(request.out, request.overwrite)
    source = open_source(request.model, trust_remote_code=request.trust_remote_code, tokenizer=request.tokenizer)
    streamed = StreamedModel(source, request.device)
    program = 0 if budget.context is None else measured_peak(None)
    table = None
    if budget.seconds is not None:
        table = LatencyTable(budget.tokens, lambda name: request.progress.start(name, 0))
    problem = build_problem(streamed, budget, asked.methods, rules, head_bits, kv_base, program, table)
    free = problem
    if rules or head_bits:
        free = build_problem(streamed, budget, asked.methods, (), None, kv_base, program, table)
    _check(problem, free)
    planning = _Planning(request, asked, problem, sensitivity, allocator)
    return planning.result()


def _kv_base(kv: KVConfig | None, budget: Budget) -> str:
    """Return the method that stores keys and values.

    Raises:
        UsageError: keys and values are not in the budget, or their bits are given.
    """
    if kv is None:
        return KV_BASE
    if budget.context is None:
        raise UsageError(
            "A budget counts weights alone; give it a context, such as 8GB at 32k context, or quantize without a "
            "KV method, and calibrate keys and values of the folder afterwards (--method none --kv NAME)."
        )
    if kv.bits is not None or kv.options:
        raise UsageError("A budget with a context chooses bits of keys and values; name the KV method alone.")
    return kv.name


def budget_recipes(
    model: str | Path,
    budgets: Sequence[str],
    calibration: CalibrationData,
    propagate: Propagate,
    head_bits: HeadBits | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
    ray: str | None = None,
) -> list[Recipe]:
    """Return the recipe of every budget, solved and not verified; they share the measured sensitivities.

    Args:
        budgets: as the user wrote them.
        model, calibration, propagate, head_bits, device, trust_remote_code, progress, ray: as for `quantize`.
    """
    request = QuantizeRequest(
        model, None, calibration, 0, device, False, False, True, propagate, None, None, None, trust_remote_code,
        progress,
    )  # fmt: skip
    return [recipe_for_budget(request, BudgetRequest(budget, ray=ray), (), head_bits).recipe for budget in budgets]


def _check(problem: Problem, unpinned: Problem) -> None:
    """Raise UsageError for a budget that cannot be met, or is met already."""
    least, free = smallest_plan(problem), smallest_plan(unpinned)
    check_feasible(problem, least.chosen, least.counted, free.counted)


@dataclass
class _Planning:
    """The choice of a plan."""

    request: QuantizeRequest
    asked: BudgetRequest
    problem: Problem
    sensitivity: Sensitivity
    allocator: Allocator
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def result(self) -> BudgetResult:
        """Return the recipe."""
        request, streamed = self.request, self.problem.streamed
        request.progress.start("reading text and model", 0)
        data = token_windows(streamed.source, request.calibration, True, 0, request.device, request.progress)
        assert data.windows is not None
        count = held_apart_windows(len(data.windows))
        kept, apart = hold_apart(data.windows, count)
        self._warn_of_context()
        run = Run(streamed, kept, self._folder(kept), request.progress)
        costs = self._costs(run)
        plan = solve_plan("plan", self.problem, costs, self.allocator)
        verified = JobData(kept, list(apart))
        verifier = Verifier(streamed, verified, request.propagate, run.folder, request.progress)
        summary = self._describe(plan, costs, len(kept), apart)
        request.progress.note(budget_text(summary))
        best = plan
        if not request.dry_run:
            best = self._verified(run, plan, costs, verifier)
            summary |= {"plans": verifier.measured, "written": best.name, **self._shapes(best, costs)}
        else:
            summary |= {"plans": [{**plan.describe(), "measured_kl": None}], "written": best.name}
        summary |= {"seconds": self.seconds, "notes": self.notes}
        if self.asked.save_recipe is not None:
            write_text(self.asked.save_recipe, readable_yaml(best.recipe, budget_text(summary)))
        return BudgetResult(best.recipe, summary, count)

    def _verified(self, run: Run, plan: Plan, costs: Costs, verifier: Verifier) -> Plan:
        """Return the plan of least measured divergence: the solved one, a corrected one, or a uniform one."""
        began = time.perf_counter()
        best, least = plan, verifier.measure(plan)
        for number in range(0 if self.problem.rounds_inputs else self.asked.corrections):
            clock = time.perf_counter()
            better = corrected_plan(run, self.problem, best, costs, self.allocator)
            self.seconds["corrections"] = self.seconds.get("corrections", 0.0) + time.perf_counter() - clock
            if better.chosen == best.chosen:
                break
            better = replace(better, name=f"correction {number + 1}")
            kl = verifier.measure(better)
            if kl >= least:
                break
            best, least = better, kl
        for uniform in uniform_plans(self.problem, costs, self.allocator)[:UNIFORMS]:
            if uniform.chosen == best.chosen:
                continue
            kl = verifier.measure(uniform)
            if kl <= least:
                best, least = uniform, kl
        self.seconds["verification"] = time.perf_counter() - began
        return best

    def _costs(self, run: Run) -> Costs:
        """Return the costs of all candidates of all units."""
        problem, began = self.problem, time.perf_counter()
        free = [unit for unit in problem.block_units if unit.name not in problem.pinned]
        limit = self._max_seconds(run)
        names = {unit.name: list(dict.fromkeys(c.weights for c in problem.candidates[unit.name])) for unit in free}
        found = measure_units(self.request, run, self.sensitivity, free, names, limit, self.asked.ray)
        if found.skipped:
            self.notes.append(
                f"{found.skipped:,} candidates were not measured, as {limit or 0:.0f} s of --max-minutes "
                "(max_minutes) were over, and follow from the ratios of others"
            )
        costs = complete_costs(found.costs[self.sensitivity.name], names)
        if not self.sensitivity.in_nats:
            scale = self._scale(run, costs)
            costs = {unit: {key: scale * cost for key, cost in own.items()} for unit, own in costs.items()}
        if problem.rounds_inputs:
            self._add_inputs(run, free, costs)
        for unit in problem.block_units:
            costs.setdefault(unit.name, {})  # a rule decides it
        ends = [unit for unit in problem.end_units if unit.name not in problem.pinned]
        if problem.ends is not None and ends:
            measured, seconds = measure_ends(run, problem.ends, ends, dict(problem.candidates))
            costs |= measured
            self.seconds["embedding and head"] = seconds
        for unit in problem.end_units:
            costs.setdefault(unit.name, {})
        if problem.kv_units:
            costs |= self._kv_costs(run)
        self.seconds["sensitivity"] = time.perf_counter() - began
        return costs

    def _add_inputs(self, run: Run, units: Sequence[Unit], costs: Costs) -> None:
        """Add the costs of candidates that round inputs: those of the weights and those of the inputs."""
        began = time.perf_counter()
        found = measure_inputs(run, units, self.problem.candidates)
        for unit in units:
            for candidate in self.problem.candidates[unit.name]:
                if candidate.inputs_key is not None:
                    of_inputs = found[unit.name][candidate.inputs_key]
                    costs[unit.name][candidate.key] = costs[unit.name][candidate.weights.key] + of_inputs
        self.seconds["inputs"] = time.perf_counter() - began
        if self.asked.corrections:
            self.notes.append("no corrections were measured, as they do not round inputs")

    def _kv_costs(self, run: Run) -> Costs:
        """Return the costs of all pairs of bits of the keys and values of every layer."""
        problem, began = self.problem, time.perf_counter()
        found = measure_keys_values(run, problem.kv_base, pairs_of(problem.kv_base))
        costs: Costs = {}
        for layer, unit in enumerate(problem.kv_units):
            pairs = {c.key: found[layer][c.pair] for c in problem.candidates[unit.name] if c.pair is not None}
            costs[unit.name] = pairs
        self.seconds["keys and values"] = time.perf_counter() - began
        return costs

    def _warn_of_context(self) -> None:
        """Note a context beyond the trained one."""
        context, trained = self.problem.budget.context, context_length(self.problem.streamed.source.config)
        if context is not None and trained is not None and context > trained:
            note = f"a context of {context:,} tokens is beyond the {trained:,} that the model was trained for"
            self.notes.append(note)
            self.request.progress.note(f"{note}; its quality there is not known")

    def _scale(self, run: Run, costs: Costs) -> float:
        """Return the divergence per unit of a cost, measured in a few blocks for one candidate of each unit."""
        depth = len(run.streamed.blocks)
        blocks = {depth * (2 * n + 1) // (2 * _SCALE_BLOCKS) for n in range(_SCALE_BLOCKS)}
        units = [u for u in self.problem.block_units if u.block in blocks and u.name not in self.problem.pinned]
        middle = {u.name: [c.weights for c in self.problem.candidates[u.name] if c.scheme][:1] for u in units}
        known = measure_blocks(run, [KL()], units, middle).costs["kl"]
        pairs = [(known[name][c.key], costs[name][c.key]) for name, [c] in middle.items()]
        return sum(kl for kl, _ in pairs) / max(sum(cost for _, cost in pairs), 1e-30)

    def _max_seconds(self, run: Run) -> float | None:
        """Return the seconds that the sensitivities may take; None for no limit."""
        if self.asked.max_minutes is not None:
            return 60 * self.asked.max_minutes
        if len(run.streamed.blocks) < _TRIAL_BLOCKS:
            return None
        recipe = self.problem.base
        prepared = PreparedJob(self.request, run.streamed, resolve_recipe(recipe, run.streamed), None, {})
        return max(_LEAST_SECONDS, 2 * short_trial(prepared, JobData(run.windows)).seconds)

    def _folder(self, windows: Tensor) -> Path:
        """Return the folder that keeps statistics and sensitivities of the model on these windows."""
        if self.request.statistics is not None:
            return self.request.statistics
        streamed = self.problem.streamed
        known = [streamed.source.fingerprint(), windows_hash(windows), str(streamed.device)]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
        folder = cache_folder() / "sensitivities" / digest
        statistics_store(folder, streamed, windows)  # refuses those of another version before any work
        return folder

    def _describe(self, plan: Plan, costs: Costs, windows: int, apart: Tensor) -> dict[str, Any]:
        """Return the plan before it is verified as plain data."""
        return {
            "text": self.problem.budget.text,
            "methods": [str(m) if isinstance(m, str) else m.name for m in self.asked.methods],
            "sensitivity": self.sensitivity.to_dict(),
            "allocator": self.allocator.to_dict(),
            "windows": windows,
            "held_apart": len(apart),
            "seqlen": int(apart.shape[1]),
            **plan.describe(),
            **({} if self.problem.memory is None else {"context": self.problem.memory.context}),
            **self._shapes(plan, costs),
        }

    def _shapes(self, plan: Plan, costs: Costs) -> dict[str, Any]:
        return {
            "kinds": describe_kinds(self.problem, costs, plan),
            "blocks": describe_blocks(plan),
            "bits_per_weight": plan.bits_per_weight,
            "size_bytes": plan.size_bytes,
            **({} if self.problem.budget.seconds is None else self._times(plan)),
            **({} if self.problem.memory is None else {"memory": describe_memory(plan), "kv": plan.recipe.kv}),
        }

    def _times(self, plan: Plan) -> dict[str, Any]:
        """Return what was timed, the time of the plan, and that of the float model's layers."""
        return {
            "tokens": self.problem.budget.tokens,
            "linear_time_s": plan.seconds,
            "float_linear_time_s": self.problem.float_ns / 1e9,
        }
