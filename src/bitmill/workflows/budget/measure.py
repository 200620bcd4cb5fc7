"""Measure sensitivities as independent tasks, each of which takes some blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bitmill.errors import UsageError
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.sensitivities import Sensitivity
from bitmill.sensitivities.base import Run
from bitmill.sensitivities.candidate import Candidate, Unit
from bitmill.sensitivities.measure import Measured, measure_blocks, prepare_measurement
from bitmill.sensitivities.store import CostStore
from bitmill.sources.open import open_source
from bitmill.workflows.prepare import QuantizeRequest
from bitmill.workflows.ray_tasks import tasks_on


@dataclass(frozen=True)
class _Part:
    """Arguments of a task: the model as another process opens it, and the units that the task measures."""

    model: str | Path
    trust_remote_code: bool
    device: str
    windows: Tensor
    folder: Path
    sensitivity: Sensitivity
    units: Sequence[Unit]
    candidates: Mapping[str, Sequence[Candidate]]
    max_seconds: float | None


def measure_units(
    request: QuantizeRequest,
    run: Run,
    sensitivity: Sensitivity,
    units: Sequence[Unit],
    candidates: Mapping[str, Sequence[Candidate]],
    max_seconds: float | None,
    ray: str | None,
) -> Measured:
    """Measure the units of the blocks, in this process or as tasks of a Ray cluster.

    Tasks share the folder of the run, and each takes every n-th block, so that all have as many of the early ones,
    which take longest. Costs are returned too, for clusters whose nodes have no folder in common.

    Args:
        request: the arguments of `quantize`.
        run: the model and the text.
        sensitivity: with options.
        units: of blocks, in order.
        candidates: name of a unit -> its candidates, by rising size.
        max_seconds: see `measure_blocks`.
        ray: address of a cluster, None for this process.
    """
    if ray is None:
        return measure_blocks(run, [sensitivity], units, candidates, max_seconds)
    model = check_model(request)
    prepare_measurement(run, sensitivity, units, candidates)
    measured = Measured(costs={sensitivity.name: {}})
    with tasks_on(ray, run.progress) as tasks:
        depth = len(run.streamed.blocks)
        count = min(tasks.workers, depth)
        chosen = [[unit for unit in units if unit.block % count == number] for number in range(count)]
        calls = [
            (_Part(
                model, request.trust_remote_code, request.device, run.windows, run.folder, sensitivity,
                some, {unit.name: candidates[unit.name] for unit in some}, max_seconds,
            ),)
            for some in chosen if some
        ]  # fmt: skip
        for _, part in tasks(_measure, calls):
            measured.add(part)
    store, found = CostStore(run.folder, sensitivity), measured.costs[sensitivity.name]
    for block in sorted({unit.block for unit in units}):
        store.save(
            block, {unit.name: found[unit.name] for unit in units if unit.block == block and unit.name in found}
        )
    return measured


def check_model(request: QuantizeRequest) -> str | Path:
    """Return the model as other processes open it.

    Raises:
        UsageError: it is a live module.
    """
    if isinstance(request.model, nn.Module):
        raise UsageError("A live module is in this process alone; with Ray name a model or a folder.")
    return request.model


def _measure(part: _Part) -> Measured:
    """Measure the units of a part."""
    streamed = StreamedModel(open_source(part.model, trust_remote_code=part.trust_remote_code), part.device)
    run = Run(streamed, part.windows, part.folder, Progress())
    return measure_blocks(run, [part.sensitivity], part.units, part.candidates, part.max_seconds)
