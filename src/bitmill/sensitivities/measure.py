"""Measure sensitivities: one walk over the blocks, in which every candidate of every unit is quantized once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitmill.calibration.collect import collect_statistics, find_stages
from bitmill.calibration.fisher import Fisher
from bitmill.calibration.store import StatisticsStore
from bitmill.calibration.streams import Streams
from bitmill.calibration.walk import walk_blocks
from bitmill.models.meta import trim_malloc
from bitmill.numerics.statistics import Statistics
from bitmill.pipeline.inputs import statistics_store
from bitmill.sensitivities.base import Change, LoadedBlock, Meter, Run, Sensitivity
from bitmill.sensitivities.candidate import Candidate, Unit, solve_unit
from bitmill.sensitivities.store import Costs, CostStore

TASK = "sensitivity"  # name of the task in the progress


@dataclass
class Measured:
    """Costs of the candidates of the units.

    Attributes:
        costs: name of a sensitivity -> name of a unit -> key of a candidate -> cost.
        cpu_seconds: name of a sensitivity -> seconds of all processors together, without those of earlier runs.
        solve_cpu_seconds: those that quantizing the candidates took.
        skipped: candidates of units that were not measured, for want of time.
    """

    costs: dict[str, Costs] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    solve_cpu_seconds: float = 0.0
    skipped: int = 0

    def add(self, other: Measured) -> None:
        """Add what another process has measured of other units."""
        self.solve_cpu_seconds += other.solve_cpu_seconds
        self.skipped += other.skipped
        for name, costs in other.costs.items():
            self.costs.setdefault(name, {}).update(costs)
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + other.cpu_seconds[name]


@torch.no_grad()
def measure_blocks(
    run: Run,
    sensitivities: Sequence[Sensitivity],
    units: Sequence[Unit],
    candidates: Mapping[str, Sequence[Candidate]],
    max_seconds: float | None = None,
) -> Measured:
    """Measure the units of the blocks; what the folder of the run holds is not measured again.

    Args:
        run: the model and the text.
        sensitivities: with options.
        units: of blocks, in order.
        candidates: name of a unit -> its candidates, by rising size; those in float are not measured.
        max_seconds: candidates are left out of later blocks so that the time is about kept; each unit keeps one.
    """
    walk = _Walk(run, sensitivities, candidates, max_seconds)
    by_block: dict[int, list[Unit]] = {}
    for unit in units:
        by_block.setdefault(unit.block, []).append(unit)
    if any(walk.missing(unit) for unit in units):
        walk.begin(units)
        for index, block in walk_blocks(run.streamed, run.progress):
            walk.block(index, block, by_block.get(index, []), len(run.streamed.blocks) - index)
        run.progress.finish()
    for sensitivity in sensitivities:
        known: Costs = {}
        for index in by_block:
            known |= walk.stores[sensitivity].load(index)
        walk.measured.costs[sensitivity.name] = known
    return walk.measured


@torch.no_grad()
def prepare_measurement(
    run: Run,
    sensitivity: Sensitivity,
    units: Sequence[Unit],
    candidates: Mapping[str, Sequence[Candidate]],
) -> None:
    """Write into the folder of the run all that processes share which measure parts of the units.

    Args:
        run: the model and the text.
        sensitivity: with options.
        units: of blocks, in order.
        candidates: name of a unit -> its candidates.
    """
    sensitivity.prepare(run)
    _solvers_fisher(run, units, candidates)
    statistics = _FloatStatistics(run)
    if not statistics.complete:
        run.progress.start("statistics", len(run.streamed.blocks))
        for index, block in walk_blocks(run.streamed, run.progress):
            statistics.of_block(index, block)
        run.progress.finish()


def _solvers_fisher(
    run: Run, units: Sequence[Unit], candidates: Mapping[str, Sequence[Candidate]]
) -> Fisher | None:
    """Return the Fisher diagonal that solvers of candidates need, which the folder keeps; None where none does."""
    needs = {need for unit in units for c in candidates[unit.name] if c.scheme for need in c.scheme.needs}
    if "fisher" not in needs:
        return None
    fisher = Fisher(run.folder)
    if not fisher.complete:
        fisher.measure(run.streamed, run.windows, run.progress)
    return fisher


class _Walk:
    """The walk over the blocks."""

    def __init__(
        self,
        run: Run,
        sensitivities: Sequence[Sensitivity],
        candidates: Mapping[str, Sequence[Candidate]],
        max_seconds: float | None,
    ) -> None:
        self.run, self.sensitivities, self.candidates = run, sensitivities, candidates
        self.stores = {sensitivity: CostStore(run.folder, sensitivity) for sensitivity in sensitivities}
        self.measured = Measured(cpu_seconds={sensitivity.name: 0.0 for sensitivity in sensitivities})
        self._deadline = None if max_seconds is None else time.perf_counter() + max_seconds
        self._meters: dict[Sensitivity, Meter] = {}
        self._spent = self._done = 0.0  # seconds of measured changes, and how many they are

    def missing(self, unit: Unit) -> list[Candidate]:
        """Return the candidates of a unit whose cost is unknown to some sensitivity."""
        known = [store.load(unit.block).get(unit.name, {}) for store in self.stores.values()]
        return [
            candidate
            for candidate in self.candidates[unit.name]
            if candidate.scheme is not None and not all(candidate.key in costs for costs in known)
        ]

    def begin(self, units: Sequence[Unit]) -> None:
        """Make the passes before the walk, for the sensitivities whose costs are incomplete."""
        run, streamed = self.run, self.run.streamed
        for sensitivity, store in self.stores.items():
            known = {block: store.load(block) for block in {unit.block for unit in units}}
            if any(self._lacks(known[unit.block], unit) for unit in units):
                began = time.process_time()
                self._meters[sensitivity] = sensitivity.begin(run)
                self.measured.cpu_seconds[sensitivity.name] += time.process_time() - began
        self._fisher = _solvers_fisher(run, units, self.candidates)
        self._statistics = _FloatStatistics(run)
        run.progress.start(TASK, len(streamed.blocks))

    def block(self, index: int, module: nn.Module, units: list[Unit], blocks_left: int) -> None:
        """Measure the units of a block."""
        stats, stages = self._statistics.of_block(index, module)
        lead_of = {name: stage[0] for stage in stages for name in stage}
        loaded = LoadedBlock(index, module, {name: stats[lead] for name, lead in lead_of.items()})
        fisher = self._fisher.block(index, self.run.streamed.device) if self._fisher else {}
        todo = {unit: self.missing(unit) for unit in units}
        chosen = self._chosen(todo, blocks_left)
        began = time.perf_counter()
        for unit, candidates in chosen:
            paths = {layer: layer.removeprefix(self.run.streamed.block_name(index) + ".") for layer in unit.layers}
            floats = {p: self.run.streamed.matrix(f"{layer}.weight").clone() for layer, p in paths.items()}
            for candidate in candidates:
                assert candidate.scheme is not None
                clock = time.process_time()
                leads = [lead_of[path] for path in floats]
                own = fisher if "fisher" in candidate.scheme.needs else {}
                weights = solve_unit(floats, stats, leads, candidate.scheme, own)
                self.measured.solve_cpu_seconds += time.process_time() - clock
                self._add(loaded, Change(weights, floats))
        found = self._finish(loaded)
        names = [(unit.name, candidate.key) for unit, candidates in chosen for candidate in candidates]
        for sensitivity, costs in found.items():
            kept: Costs = {}
            for (unit_name, key), cost in zip(names, costs):
                kept.setdefault(unit_name, {})[key] = cost
            if kept:
                self.stores[sensitivity].save(index, kept)
        self._spent, self._done = self._spent + time.perf_counter() - began, self._done + len(names)
        trim_malloc()

    def _add(self, block: LoadedBlock, change: Change) -> None:
        """Pass a change to every meter."""
        for sensitivity, meter in self._meters.items():
            clock = time.process_time()
            meter.add(block, change)
            self.measured.cpu_seconds[sensitivity.name] += time.process_time() - clock

    def _finish(self, block: LoadedBlock) -> dict[Sensitivity, list[float]]:
        """Return the costs of the changes of a block, by every meter."""
        costs = {}
        for sensitivity, meter in self._meters.items():
            clock = time.process_time()
            costs[sensitivity] = meter.finish(block)
            self.measured.cpu_seconds[sensitivity.name] += time.process_time() - clock
        return costs

    def _lacks(self, known: Costs, unit: Unit) -> bool:
        keys = {c.key for c in self.candidates[unit.name] if c.scheme is not None}
        return not keys <= known.get(unit.name, {}).keys()

    def _chosen(self, todo: dict[Unit, list[Candidate]], blocks_left: int) -> list[tuple[Unit, list[Candidate]]]:
        """Return the candidates to measure of each unit of a block: all, or evenly spaced ones in little time."""
        most = max(map(len, todo.values()), default=0)
        if self._deadline is None or not self._done or not most:
            return list(todo.items())
        seconds = max(self._deadline - time.perf_counter(), 0.0) / blocks_left
        each = int(seconds * self._done / max(self._spent, 1e-9) / len(todo))
        count, chosen = max(1, each), []
        for unit, candidates in todo.items():
            places = sorted({(2 * n + 1) * len(candidates) // (2 * count) for n in range(count)})
            chosen.append((unit, candidates if count >= len(candidates) else [candidates[at] for at in places]))
        self.measured.skipped += sum(map(len, todo.values())) - sum(len(some) for _, some in chosen)
        return chosen


class _FloatStatistics:
    """Statistics of the float model's blocks: from the folder, or collected and kept there."""

    def __init__(self, run: Run) -> None:
        self._run, streamed = run, run.streamed
        self._store: StatisticsStore = statistics_store(run.folder, streamed, run.windows)
        self._streams: Streams | None = None
        if not self.complete:
            with streamed.non_block_weights("embedding"):
                self._streams = Streams(streamed, run.windows, compare=False)

    @property
    def complete(self) -> bool:
        """True where the folder has the statistics of all blocks."""
        return all(self._store.has(index) for index in range(len(self._run.streamed.blocks)))

    def of_block(self, index: int, module: nn.Module) -> tuple[dict[str, Statistics], list[list[str]]]:
        """Return statistics by the first linear of each stage, and the stages."""
        if self._store.has(index):
            stored = self._store.load(index, self._run.streamed.device)
            if self._streams:
                self._streams.advance(module, index, [])
            stages = stored.stages or [list(stage) for stage in self._run.streamed.adapter.stages]
            return stored.stats, stages
        assert self._streams is not None
        streamed, streams = self._run.streamed, self._streams
        stages = find_stages(streamed.adapter, module, *streams.first_window(index))
        leads = [stage[0] for stage in stages]
        stats = collect_statistics(module, streams.hidden.batches, streams.calls(index), leads)
        streams.advance(module, index, [])
        largest = streamed.note_hidden_states(*streams.hidden.batches)
        self._store.save(index, stats, stages, largest)
        return stats, stages


def complete_costs(costs: Costs, candidates: Mapping[str, Sequence[Candidate]]) -> Costs:
    """Return costs of all candidates; those that were not measured follow from the ratios of units that were.

    The logarithm of a cost is that of a measured candidate of the unit plus their mean difference over the units
    for which both are known, averaged over the measured candidates. Float costs nothing.

    Args:
        costs: name of a unit -> key -> cost, at least one for each unit.
        candidates: name of a unit -> its candidates.
    """
    logs = {
        unit: {key: torch.tensor(max(cost, 1e-12), dtype=torch.float64).log() for key, cost in known.items()}
        for unit, known in costs.items()
    }
    completed: Costs = {}
    for unit, own in candidates.items():
        known = costs.get(unit, {})
        completed[unit] = {}
        for candidate in own:
            if candidate.scheme is None or candidate.key in known:
                completed[unit][candidate.key] = 0.0 if candidate.scheme is None else known[candidate.key]
            else:
                completed[unit][candidate.key] = _from_ratios(logs, unit, candidate.key)
    return completed


def _from_ratios(logs: Mapping[str, Mapping[str, Tensor]], unit: str, key: str) -> float:
    estimates = []
    for anchor, log in logs.get(unit, {}).items():
        differences = [other[key] - other[anchor] for other in logs.values() if key in other and anchor in other]
        if differences:
            estimates.append(log + torch.stack(differences).mean())
    if not estimates:  # no unit has both: the mean over units
        estimates = [other[key] for other in logs.values() if key in other]
    return float(torch.stack(estimates).mean().exp())
