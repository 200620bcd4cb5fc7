"""Quantize one block: observe, fold transforms, tune, solve stage by stage, tune, and feed the next."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bitmill.calibration.collect import collect_statistics
from bitmill.calibration.fisher import Fisher, rescale_fisher
from bitmill.calibration.staged_forward import StagedForward, find_stages
from bitmill.calibration.store import StatisticsStore
from bitmill.calibration.streams import Streams
from bitmill.formats import Params
from bitmill.formats.quantized import shared_module_path
from bitmill.models.meta import trim_malloc
from bitmill.numerics.gram import RunningGram
from bitmill.numerics.statistics import FISHER, Statistics
from bitmill.pipeline.fold import fold_transforms
from bitmill.pipeline.job import BlockResult, Job, LayerResult
from bitmill.recipes.scheme import LayerScheme
from bitmill.solvers.base import output_error, solve_stacked
from bitmill.tuners import BlockTask


@dataclass
class _Work:
    """A block being quantized, and what is remembered of it for the report."""

    job: Job
    task: BlockTask
    stages: list[list[str]]
    keep: bool  # float weights and statistics are kept until tuners are done
    shared: dict[str, Params]  # linear -> parts that it shares with its like in other blocks
    fisher: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def quantize_block(
    job: Job,
    block: nn.Module,
    index: int,
    streams: Streams | None,
    store: StatisticsStore | None,
    fisher: Fisher | None,
    shared: dict[str, Params],
) -> BlockResult:
    """Quantize the linears of one block in place and move the streams past it."""
    recipe, streamed = job.recipe, job.streamed
    adapter, prefix = streamed.adapter, streamed.block_name(index)
    calls = streams.calls(index) if streams else []
    stages = [list(stage) for stage in adapter.stages]
    if streams:
        stages = find_stages(adapter, block, *streams.first_window(index))
    elif store and store.has(index):  # by the leads of its stages
        stages = store.stages(index) or stages
    leads = [stage[0] for stage in stages]
    names = [n for stage in stages for n in stage if job.quantizes(f"{prefix}.{n}")]

    targets = streams.float_outputs(block, index) if streams else []
    seen: dict[str, Statistics] = {}
    if job.propagate == "float" and recipe.needs - FISHER:
        seen = _float_statistics(job, block, index, streams, stages, store)
    elif "activations" in recipe.needs:
        assert streams is not None
        seen = collect_statistics(block, streams.hidden.batches, calls, leads)

    formats = {name: job.scheme(f"{prefix}.{name}").format for name in names}
    task = BlockTask(
        block, names, formats, calls, [], targets, index, len(streamed.blocks), adapter.transposed,
        adapter.seams,
    )  # fmt: skip
    if streams and recipe.tuners:  # nobody else needs the inputs once they have passed
        task.inputs = list(streams.hidden.batches)
    work = _Work(job, task, stages, bool(recipe.tuners), shared)
    if work.keep:
        task.dtypes = {name: streamed.dtype(f"{prefix}.{name}") for name, _ in task.floats()}
    before = {name: task.matrix(name).clone() for name in names} if fisher and recipe.transforms else {}
    result = BlockResult(index, changed=fold_transforms(job, index, seen))
    # beside the block as it is quantized, the float one in the same basis
    twin = copy.deepcopy(block) if "cross" in recipe.needs and job.propagate == "quantized" else None
    if fisher:
        work.fisher = fisher.block(index, streamed.device)
        for name, W in before.items():
            work.fisher[name] = rescale_fisher(work.fisher[name], W, task.matrix(name))
    floats = {name: p.detach().clone() for name, p in task.floats()} if recipe.tuners else {}
    task.stages, task.input_stats = stages, seen
    for tuner in recipe.tuners:
        tuner.before(task)
    outputs = _solve(work, streams, seen, twin)
    for tuner in recipe.tuners:
        tuner.after(task)
    _note_floats(work, floats, result)
    for name in names:
        place = shared_module_path(name) if name in shared else ""
        result.layers[f"{prefix}.{name}"] = LayerResult(task.quantized[name], *_errors(work, name), place)
    if streams:
        tuned = bool(recipe.tuners)
        streams.advance(block, index, targets, None if tuned else outputs, job.propagate == "float")
    return result


def _float_statistics(
    job: Job,
    block: nn.Module,
    index: int,
    streams: Streams | None,
    stages: list[list[str]],
    store: StatisticsStore | None,
) -> dict[str, Statistics]:
    """The float model's statistics of a block, from the store where it has them."""
    if store and store.has(index):
        return store.load(index, job.streamed.device)
    assert streams is not None
    seen = collect_statistics(block, streams.hidden.batches, streams.calls(index), [stage[0] for stage in stages])
    if store:
        store.save(index, seen, stages)
    return seen


def _solve(
    work: _Work, streams: Streams | None, seen: dict[str, Statistics], twin: nn.Module | None
) -> list[Tensor] | None:
    """Solve every stage. Returns the block's outputs where the passes that collect statistics yield them."""
    job, task = work.job, work.task
    if job.propagate == "float" or not job.recipe.needs & {"gram", "cross"}:
        for stage in work.stages:
            stats = seen.get(stage[0], Statistics())
            if stats.gram is not None and "cross" in job.recipe.needs:  # the inputs are the float model's own
                stats = replace(stats, cross=torch.zeros_like(stats.gram))
            _solve_stage(work, stage, stats)
        return None
    assert streams is not None
    leads = [stage[0] for stage in work.stages]
    inputs = list(streams.hidden.batches) if job.recipe.tuners else streams.hidden.batches
    forward = StagedForward(task.block, inputs, task.calls, leads)
    beside = None
    if twin is not None:
        assert streams.float is not None
        beside = StagedForward(twin, list(streams.float.batches), task.calls, leads)
    try:
        for stage in work.stages:
            _solve_stage(work, stage, _statistics(forward, beside, stage[0], task.matrix(stage[0]).shape[1], job))
        return forward.outputs()
    finally:
        forward.close()
        if beside:
            beside.close()


def _statistics(
    forward: StagedForward, beside: StagedForward | None, lead: str, width: int, job: Job
) -> Statistics:
    """What a stage's inputs say about its linears."""
    gram = RunningGram(width, job.streamed.device)
    if beside is None:
        for X in forward.inputs(lead):
            gram.add(X)
        return Statistics(gram.mean(), gram.tokens)
    cross = torch.zeros(width, width, device=job.streamed.device)
    for X, X_float in zip(forward.inputs(lead), beside.inputs(lead)):
        gram.add(X)
        cross.addmm_((X_float - X).T, X)
    return Statistics(gram.mean(), gram.tokens, cross.div_(max(gram.tokens, 1)))


def _solve_stage(work: _Work, stage: list[str], stats: Statistics) -> None:
    """Quantize the linears that read one input, but for those that a tuner has settled."""
    task, prefix = work.task, work.job.streamed.block_name(work.task.index)
    for name in stage:
        if work.keep:
            task.stats[name] = Statistics(stats.gram)
    groups: dict[LayerScheme, list[str]] = {}
    for name in stage:
        if name in task.names and name not in task.quantized:
            groups.setdefault(work.job.scheme(f"{prefix}.{name}"), []).append(name)
    for scheme, names in groups.items():
        _solve_group(work, scheme, names, stats)
    trim_malloc()  # splinters of one stage must not add to the next one's peak


def _solve_group(work: _Work, scheme: LayerScheme, names: list[str], stats: Statistics) -> None:
    """Quantize linears that read one input and have one scheme."""
    task = work.task
    if work.fisher:
        stats = replace(stats, fisher=torch.cat([work.fisher[name] for name in names]))
    matrices = [task.matrix(name) for name in names]
    shared = [work.shared.get(name) for name in names]
    solved = solve_stacked(scheme.solver, matrices, stats, scheme.format, shared)
    for name, W, quantized in zip(names, matrices, solved):
        if work.keep:
            task.set_quantized(name, quantized)
        else:
            decoded = quantized.dequantize()
            work.errors[name] = _compare(W, decoded, stats.gram)
            task.quantized[name] = quantized
            task.set_matrix(name, decoded)


def _compare(W: Tensor, decoded: Tensor, gram: Tensor | None) -> tuple[float, float | None]:
    return output_error(W, decoded, None), None if gram is None else output_error(W, decoded, gram)


def _errors(work: _Work, name: str) -> tuple[float, float | None]:
    """The errors of a layer as it ended, tuners included."""
    if not work.keep:
        return work.errors[name]
    task = work.task
    stats = task.stats.get(name, Statistics())
    return _compare(task.originals[name], task.quantized[name].dequantize(), stats.gram)


def _note_floats(work: _Work, before: dict[str, Tensor], result: BlockResult) -> None:
    """Round what tuners changed to the type in which it will be stored, and note it."""
    streamed = work.job.streamed
    for name, parameter in work.task.floats():
        if name in before and not torch.equal(before[name], parameter):
            full = f"{streamed.block_name(result.index)}.{name}"
            stored = parameter.detach().to(streamed.dtype(full))
            streamed.set_parameter(full, stored.float())
            result.changed[full] = stored
