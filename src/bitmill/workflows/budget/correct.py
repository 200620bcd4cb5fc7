"""Correction of a plan: sensitivities measured around the quantized model of the plan instead of the float model.

Costs of single layers do not add up below 3 bits. Each unit moves to its next smaller and its next larger
candidate while all others stay as planned; the measured changes of the divergence replace the costs, and the
allocator chooses among these neighbours. Embedding and head, and keys and values, stay as planned.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from bitmill.allocators import Allocator
from bitmill.allocators.base import Choices
from bitmill.calibration.fisher import Fisher
from bitmill.calibration.walk import walk_blocks
from bitmill.files import write_tensors
from bitmill.pipeline.inputs import statistics_store
from bitmill.progress import Progress
from bitmill.sensitivities.base import LoadedBlock, Run
from bitmill.sensitivities.candidate import Candidate, Unit, solve_unit
from bitmill.sensitivities.divergence import Divergences
from bitmill.sensitivities.store import Costs
from bitmill.workflows.budget.plan import Plan, solve_plan
from bitmill.workflows.budget.problem import Problem

TASK = "correcting the plan"
WINDOWS, TOKENS = 2, 256


@torch.no_grad()
def corrected_plan(
    run: Run, problem: Problem, plan: Plan, costs: Costs, allocator: Allocator, windows: int = WINDOWS
) -> Plan:
    """Return the plan that is best by changes measured around another one.

    Args:
        run: the model and the text; its folder holds the statistics of all blocks.
        problem: the problem.
        plan: the plan to correct.
        costs: costs around the float model.
        allocator: the allocator.
        windows: calibration windows to measure on.
    """
    neighbours = {unit.name: _neighbours(problem, costs, plan, unit) for unit in problem.block_units}
    with tempfile.TemporaryDirectory(prefix="bitmill-") as temporary:
        around = _Around(run, problem, plan, Path(temporary), windows)
        run.progress.start(TASK, 2 * len(run.streamed.blocks))
        around.quantize(run.progress)
        changed = around.measure(neighbours, run.progress)
        run.progress.finish()
    price = _price_of_a_move(plan, costs, changed)
    priced: Costs = {
        name: {key: change + price * (key != plan.chosen[name].key) for key, change in own.items()}
        for name, own in changed.items()
    }
    limits = {name: set(known) for name, known in changed.items()}
    for unit in (*problem.end_units, *problem.kv_units):
        limits[unit.name] = {plan.chosen[unit.name].key}
        priced[unit.name] = {}
    found = solve_plan("corrected plan", problem, priced, allocator, limits=limits)
    around_float = sum(costs[name].get(candidate.key, 0.0) for name, candidate in found.chosen.items())
    return replace(found, predicted=around_float)


def _price_of_a_move(plan: Plan, costs: Costs, changed: Costs) -> float:
    """Return the change of the divergence that a move must gain: the median of what both measurements differ by.

    A few windows measure each change with an error, and the allocator picks those that seem best by chance.
    """
    differences = [
        abs(change - costs[name].get(key, 0.0) + costs[name].get(plan.chosen[name].key, 0.0))
        for name, own in changed.items()
        for key, change in own.items()
        if key != plan.chosen[name].key
    ]
    return median(differences) if differences else 0.0


def _neighbours(problem: Problem, costs: Costs, plan: Plan, unit: Unit) -> list[Candidate]:
    """Return the next smaller and the next larger candidate of a unit on its Pareto front."""
    candidates, bits = problem.candidates[unit.name], problem.sizes[unit.name]
    front = Choices(bits, tuple(costs[unit.name].get(c.key, 0.0) for c in candidates)).pareto()
    at = candidates.index(plan.chosen[unit.name])
    below = [j for j in front if bits[j] < bits[at]]
    above = [j for j in front if bits[j] > bits[at]]
    return [candidates[j] for j in (*below[-1:], *above[:1])]


@dataclass
class _Around:
    """The quantized model of a plan, kept block by block in a folder."""

    run: Run
    problem: Problem
    plan: Plan
    folder: Path
    windows: int

    def quantize(self, progress: Progress) -> None:
        """Write the decoded weights of every block."""
        for index, _ in walk_blocks(self.run.streamed, progress):
            decoded: dict[str, torch.Tensor] = {}
            for unit in self._units(index):
                decoded |= self._solve(unit, self.plan.chosen[unit.name])
            write_tensors(self._file(index), decoded, sync=False)

    def measure(self, neighbours: dict[str, list[Candidate]], progress: Progress) -> Costs:
        """Return the change of the divergence for every neighbour of every unit; 0 for the plan's own."""
        streamed, changed = self.run.streamed, dict[str, dict[str, float]]()
        divergences = Divergences(streamed, self.run.windows[: self.windows, :TOKENS], self._restore)
        base: float | None = None
        for index, block in walk_blocks(streamed, progress):
            # candidates are solved for the float weights, and the block runs with those of the plan
            moves = [(u, c, self._solve(u, c)) for u in self._units(index) for c in neighbours[u.name]]
            self._restore(index)
            loaded = LoadedBlock(index, block, {})
            if base is None:
                divergences.add(loaded, {})
            for _, _, weights in moves:
                divergences.add(loaded, weights)
            found = divergences.finish(loaded)
            if base is None:
                base, *found = found
            for unit in self._units(index):
                changed[unit.name] = {self.plan.chosen[unit.name].key: 0.0}
            for (unit, candidate, _), divergence in zip(moves, found):
                changed[unit.name][candidate.key] = divergence - base
        return changed

    def _units(self, index: int) -> Sequence[Unit]:
        return [unit for unit in self.problem.block_units if unit.block == index]

    def _path(self, layer: str) -> str:
        return ".".join(layer.split(".")[len(self.run.streamed.block_name(0).split(".")) :])

    def _solve(self, unit: Unit, candidate: Candidate) -> dict[str, torch.Tensor]:
        """Return the decoded weights of a unit of the block in memory, by path, with float weights in it."""
        streamed = self.run.streamed
        matrices = {self._path(layer): streamed.matrix(f"{layer}.weight").clone() for layer in unit.layers}
        if candidate.scheme is None:
            return matrices
        stored = statistics_store(self.run.folder, streamed, self.run.windows).load(unit.block, streamed.device)
        lead_of = {name: stage[0] for stage in stored.stages or streamed.adapter.stages for name in stage}
        needs_fisher = "fisher" in candidate.scheme.needs
        fisher = Fisher(self.run.folder).block(unit.block, streamed.device) if needs_fisher else {}
        return solve_unit(matrices, stored.stats, [lead_of[path] for path in matrices], candidate.scheme, fisher)

    def _restore(self, index: int) -> None:
        """Give a loaded block the weights of the plan."""
        for path, W in load_file(self._file(index)).items():
            self.run.streamed.set_matrix(f"{self.run.streamed.block_name(index)}.{path}.weight", W)

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"
