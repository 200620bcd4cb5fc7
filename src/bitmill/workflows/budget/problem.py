"""The problem of a plan on a model: the units, their candidates and sizes, and the bits that are left for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bitmill.errors import RecipeError, UsageError
from bitmill.formats import Format
from bitmill.models.embedding_and_head import EmbeddingAndHead, find_embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import NON_BLOCK
from bitmill.recipes.compose import HeadBits, compose, with_head
from bitmill.recipes.inputs import FLOAT
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.recipes.rules import Rule
from bitmill.recipes.scheme import LayerScheme
from bitmill.sensitivities.candidate import FLOAT_LABEL, KEYS_VALUES, Candidate, Unit, block_units
from bitmill.solvers import SOLVERS
from bitmill.workflows.budget.candidates import block_candidates, head_candidates
from bitmill.workflows.budget.keys_values import KV_BASE, keys_values, pair_method
from bitmill.workflows.budget.latency import LatencyTable
from bitmill.workflows.budget.memory import RunningMemory, loaded_bits, running_memory
from bitmill.workflows.budget.size import Budget
from bitmill.workflows.folder_size import weight_files_bytes
from bitmill.workflows.sizes import float_bytes


@dataclass(frozen=True)
class Problem:
    """Everything that a plan is chosen from.

    Attributes:
        streamed: the float model; no weight is read.
        budget: the budget.
        base: a recipe with the rules of the user, whose head is that of the result where files do not count.
        units: of the blocks; with a budget of files those outside the blocks too, which come last.
        candidates: name of a unit -> its candidates, by rising size.
        sizes: name of a unit -> bits of each candidate, with a budget of time nanoseconds.
        pinned: names of the units that a rule, or head_bits, decides.
        ends: embedding and head, where they are units.
        memory: of the process at the budget's context; None for other budgets.
        kv_base: method that stores keys and values, where they are units.
        float_ns: with a budget of time, nanoseconds of all units in float.
    """

    streamed: StreamedModel
    budget: Budget
    base: Recipe
    units: tuple[Unit, ...]
    candidates: dict[str, tuple[Candidate, ...]]
    sizes: dict[str, tuple[int, ...]]
    pinned: frozenset[str]
    ends: EmbeddingAndHead | None
    memory: RunningMemory | None = None
    kv_base: str = ""
    float_ns: int = 0

    @cached_property
    def weights(self) -> int:
        """The number of weights in the linears of the blocks."""
        return sum(math.prod(site.shape) for site in self.streamed.all_sites())

    @cached_property
    def block_units(self) -> tuple[Unit, ...]:
        """The units of the blocks."""
        return tuple(unit for unit in self.units if unit.block >= 0)

    @cached_property
    def end_units(self) -> tuple[Unit, ...]:
        """The units outside the blocks."""
        return tuple(unit for unit in self.units if unit.block == NON_BLOCK)

    @cached_property
    def rounds_inputs(self) -> bool:
        """True where some candidate rounds the inputs of layers."""
        return any(c.inputs_key is not None for own in self.candidates.values() for c in own)

    @cached_property
    def kv_units(self) -> tuple[Unit, ...]:
        """The units that are keys and values, one a layer."""
        return tuple(unit for unit in self.units if unit.block == KEYS_VALUES)

    def bits(self, chosen: dict[str, Candidate]) -> int:
        """Return the bits of all units, with a budget of time their nanoseconds.

        Args:
            chosen: name of a unit -> its candidate.
        """
        return sum(self.sizes[u.name][self.candidates[u.name].index(chosen[u.name])] for u in self.units)

    def block_bits(self, chosen: dict[str, Candidate]) -> int:
        """Return the bits of the linears of the blocks.

        Args:
            chosen: name of a unit -> its candidate.
        """
        return sum(self.stored_bits(unit, chosen[unit.name]) for unit in self.block_units)

    def stored_bits(self, unit: Unit, candidate: Candidate) -> int:
        """Return the bits of a unit of the blocks in files, at one of its candidates."""
        return sum(
            _stored_bits(candidate.format, self._shapes[layer], self._types[layer]) for layer in unit.layers
        )

    @cached_property
    def float_memory(self) -> int:
        """The peak of the float model at the context, with an ordinary cache, both in fp32."""
        assert self.memory is not None
        every = sum(math.prod(self.streamed.shape(name)) for name in self.streamed.names())
        cached = sum(self.memory.cache_bits(None, number) for number in range(len(self.memory.layers)))
        return self.memory.needed(4 * every - self.memory.others + cached / 8)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {site.layer: (site.shape[0], site.shape[1]) for site in self.streamed.all_sites()}

    @cached_property
    def _types(self) -> dict[str, torch.dtype]:
        return {site.layer: self.streamed.dtype(site.path) for site in self.streamed.all_sites()}


def build_problem(
    streamed: StreamedModel,
    budget: Budget,
    methods: Sequence[str | Recipe],
    rules: Sequence[str | Rule],
    head_bits: HeadBits | None,
    kv_base: str = KV_BASE,
    program: int = 0,
    latency: LatencyTable | None = None,
) -> Problem:
    """Build the problem of a budget on a model.

    Args:
        streamed: the float model; no weight is read.
        budget: the budget.
        methods, rules, head_bits: as for `quantize`.
        kv_base: with a context, the method that stores keys and values.
        program: with a context, the measured bytes of a process without a model.
        latency: with a budget of time, the times of layers.

    Raises:
        UsageError: a method that cannot be a candidate; nothing is needed; or a rule contradicts the budget.
        RecipeError: a rule is wrong.
    """
    if not streamed.task.generates:
        raise UsageError(
            f"{streamed.source.name} is {streamed.task.description}; a budget needs a language model, whose "
            "divergence is measured."
        )
    options = block_candidates(methods)
    if budget.context is not None:  # a recipe quantizes some layer, even where keys and values alone had to shrink
        options = [candidate for candidate in options if candidate.scheme is not None]
    first = next(candidate.scheme for candidate in options if candidate.scheme)
    base = Recipe("budget", first.weight, first.solver, first.transforms)
    base = with_head(compose(base, rules=rules) if rules else base, head_bits)
    base = replace(base, name=f"budget-{budget.text}")
    resolve_recipe(base, streamed)  # refuses rules that do not fit the model
    shapes = {site.layer: (site.shape[0], site.shape[1]) for site in streamed.all_sites()}
    types = {site.layer: streamed.dtype(site.path) for site in streamed.all_sites()}
    candidates, pinned, units = dict[str, tuple[Candidate, ...]](), set[str](), list(block_units(streamed))
    for unit in units:
        ruled = _ruled(base, unit)
        candidates[unit.name] = tuple(options) if ruled is None else (ruled,)
        pinned |= {unit.name} if ruled is not None else set()
    ends = None
    if budget.counts_files and not isinstance(found := find_embedding_and_head(streamed), str):
        ends = found
        for site in ends.sites(streamed):
            unit = Unit((site.layer,), NON_BLOCK)
            units.append(unit)
            shapes[site.layer] = (site.shape[0], site.shape[1])
            types[site.layer] = streamed.dtype(ends.stored_name(site.layer, streamed))
            fixed = _fixed_end(base, ends, site.layer, frozenset(shapes))
            candidates[unit.name] = tuple(head_candidates()) if fixed is None else (fixed,)
            pinned |= {unit.name} if fixed is not None else set()
    memory = None
    if budget.context is not None:
        kv_units, own = keys_values(streamed, kv_base)
        units, candidates = [*units, *kv_units], {**candidates, **own}
        memory = running_memory(streamed, budget.context, program, shapes)
    sizes: dict[str, tuple[int, ...]] = {}
    for unit in units:
        if latency is None:
            bits = {c: _bits(c, unit, shapes, types, memory, kv_base) for c in candidates[unit.name]}
        else:
            bits = {c: _nanoseconds(c, unit, shapes, latency) for c in candidates[unit.name]}
        by_size = sorted(bits, key=lambda c: bits[c])
        candidates[unit.name], sizes[unit.name] = tuple(by_size), tuple(bits[c] for c in by_size)
    return Problem(
        streamed,
        budget,
        base,
        tuple(units),
        candidates,
        sizes,
        frozenset(pinned),
        ends,
        memory,
        kv_base,
        0
        if latency is None
        else sum(_nanoseconds(Candidate(FLOAT_LABEL), unit, shapes, latency) for unit in units),
    )


def check_feasible(problem: Problem, least: dict[str, Candidate], least_size: float, unpinned_size: float) -> None:
    """Raise UsageError where the budget is above the float model, or below the smallest plan.

    Args:
        problem: the problem.
        least: the smallest plan.
        least_size: its bits per weight, bytes or seconds.
        unpinned_size: the size without the rules of the user.
    """
    budget = problem.budget
    limit = float(budget.bits_per_weight or budget.size_bytes or budget.seconds or 0)
    unit = "bytes" if budget.counts_files else "bits per weight"
    if problem.memory is not None:
        unit = f"bytes of memory at {budget.context:,} tokens"
    shown = (lambda size: f"{size:,.0f}") if budget.counts_files else (lambda size: f"{size:.3f}")
    types = {site.path: problem.streamed.dtype(site.path) for site in problem.streamed.all_sites()}
    block_bits = sum(8 * types[s.path].itemsize * math.prod(s.shape) for s in problem.streamed.all_sites())
    most = float_bytes(problem.streamed) if budget.counts_files else block_bits / problem.weights
    if problem.memory is not None:
        most = problem.float_memory
    if budget.seconds is not None:
        unit, most = f"seconds for {budget.tokens:,} tokens in the linear layers", problem.float_ns / 1e9
        shown = "{:.5f}".format
    if limit >= most:
        raise UsageError(
            f"The budget of {budget.text} holds the float model, which has {shown(most)} {unit}; nothing needs to "
            "be quantized."
        )
    if least_size <= limit:
        return
    if unpinned_size <= limit:
        raise UsageError(
            f"The rules and head bits need at least {shown(least_size)} {unit}, above the budget of "
            f"{budget.text}; without them it can be met, so change them or raise the budget."
        )
    labels = sorted({least[unit.name].label for unit in problem.block_units})
    raise UsageError(
        f"The budget of {budget.text} is below the {shown(least_size)} {unit} that the smallest candidates need "
        f"({', '.join(labels)}); raise it, or add methods of fewer bits with --methods (methods)."
    )


def files_bytes(problem: Problem, recipe: Recipe) -> int:
    """Return the bytes of all files of weights that a recipe gives."""
    return weight_files_bytes(problem.streamed, resolve_recipe(recipe, problem.streamed))


def _ruled(base: Recipe, unit: Unit) -> Candidate | None:
    """Return the candidate that the rules of the user give a unit, None where no rule matches it.

    Raises:
        RecipeError: the rules match some layers of the unit alone.
    """
    rules = [base.rule_for(layer) for layer in unit.layers]
    if not any(rules):
        return None
    if not all(rules):
        raise RecipeError(
            f"The rules match some of {', '.join(unit.layers)} alone, which engines fuse into one matrix; give "
            "all of them one format."
        )
    scheme = base.scheme(unit.layers[0])
    rule = rules[0]
    assert rule is not None
    return Candidate(FLOAT_LABEL if scheme is None else f"rule {rule.sites}", scheme)


def _fixed_end(base: Recipe, ends: EmbeddingAndHead, layer: str, linears: frozenset[str]) -> Candidate | None:
    """Return the candidate of embedding or head that a rule or head_bits decides; None where it is free."""
    names = (ends.embedding, ends.head) if ends.tied else (layer,)
    inside = linears - set(ends.layers)
    rules = (
        r for r in base.rules if any(map(r.matches, names)) and (r.is_float or not any(map(r.matches, inside)))
    )
    rule = next(rules, None)
    format = base.head if rule is None else rule.weight
    if format is None:
        return None
    if not isinstance(format, Format):
        return Candidate(FLOAT_LABEL)
    nearest = SOLVERS.from_dict({"solver": "nearest", "search": True})
    return Candidate("head_bits" if rule is None else f"rule {rule.sites}", LayerScheme(format, nearest))


def _bits(
    candidate: Candidate,
    unit: Unit,
    shapes: dict[str, tuple[int, int]],
    types: dict[str, torch.dtype],
    memory: RunningMemory | None,
    kv_base: str,
) -> int:
    """Return the bits of a unit: stored, or in memory."""
    if candidate.pair is not None:
        assert memory is not None
        number = int(unit.layers[0].rpartition(".")[2])
        return memory.cache_bits(pair_method(kv_base, candidate.pair, number + 1), number)
    format = None if candidate.format == FLOAT else candidate.format
    if memory is not None:
        return sum(loaded_bits(format, shapes[layer]) for layer in unit.layers)
    return sum(_stored_bits(format, shapes[layer], types[layer]) for layer in unit.layers)


def _nanoseconds(
    candidate: Candidate, unit: Unit, shapes: dict[str, tuple[int, int]], latency: LatencyTable
) -> int:
    """Return the measured time of the layers of a unit, one after another."""
    format = None if candidate.format == FLOAT else candidate.format
    return round(1e9 * sum(latency.seconds(format, shapes[layer]) for layer in unit.layers))


def _stored_bits(format: Format | None, shape: tuple[int, int], type: torch.dtype) -> int:
    """Return the bits of a layer in files; None, or "float", is its own type."""
    if format is None or format == FLOAT:
        return 8 * type.itemsize * math.prod(shape)
    return format.own_bits(shape)
