"""A probe: the recipe itself on one block of each kind, with few windows and then with more of them.

    total(w) = outside(w) + sum over blocks of inside(w)        w: calibration windows; both are straight lines

`inside` is what happens between loading and freeing a block, in every walk over the blocks; `outside` is the rest.
Both are measured with the blocks that differ in shapes or formats, each once, so that the cost of a solver, a
tuner or a transform is its own and no formula for it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitmill.calibration.streams import BATCH_TOKENS
from bitmill.calibration.token_windows import JobData
from bitmill.checkpoint.work_folder import WorkFolder
from bitmill.checkpoint.writer import FolderSink
from bitmill.data.sentences import MIN_SENTENCES
from bitmill.evaluation.reference import ReferenceRecorder
from bitmill.models.some_blocks import SomeBlocks
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult, Job, run
from bitmill.pipeline.job import NON_BLOCK, Shared
from bitmill.pipeline.measure import HeldOutMetrics
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.workflows.cost import Clock, Cost, PeakMemory, now
from bitmill.workflows.prepare import PreparedJob

SECONDS = 30.0  # about as long as the second probe may take
_FLOAT_BYTES = 4
_LONG_S = 5.0  # a trial of this length is not repeated to leave out what happens once in a process
_KINDS = 4  # most kinds of blocks that are probed; others cost as much per weight as the first


class TimedBlocks(SomeBlocks):
    """Some blocks of a model that measure the work on each, from loading it to freeing it."""

    def __init__(self, streamed: StreamedModel, indices: Sequence[int]) -> None:
        super().__init__(streamed, indices)
        self.costs = [Cost() for _ in indices]
        self._began = Cost()

    def load_block(self, index: int) -> nn.Module:
        """Load one block and return it."""
        self._began = now()
        return super().load_block(index)

    def free_block(self, index: int) -> None:
        """Free the memory of one block."""
        super().free_block(index)
        self.costs[index] += now() - self._began


class MemorySink:
    """A sink that keeps the results in memory."""

    def __init__(self) -> None:
        self.work: Path | None = None
        self.results: list[BlockResult] = []
        self.parts: Shared = {}

    def finished(self, index: int) -> BlockResult | None:
        """Return None: nothing is kept between runs."""
        return None

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Keep a finished block."""
        self.results.append(result)

    def shared(self) -> Shared | None:
        """Return None: nothing is kept between runs."""
        return None

    def share(self, parts: Shared) -> None:
        """Keep the parts that layers share."""
        self.parts = parts


class ProbeSink(MemorySink):
    """A sink that also writes the blocks, into a folder that is removed."""

    def __init__(self, files: FolderSink) -> None:
        super().__init__()
        self.files = files
        self.work = files.work

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Write and keep a finished block."""
        super().write(result, streamed)
        self.files.write(result, streamed)

    def share(self, parts: Shared) -> None:
        """Write and keep the parts that layers share."""
        super().share(parts)
        self.files.share(parts)


@dataclass(frozen=True)
class Kinds:
    """The kinds of blocks of a model: those with equal shapes and formats.

    Attributes:
        probed: a block of each kind.
        like: for every block, the probed block of its kind.
        shares: cost of every block, in units of that of its probed block.
    """

    probed: tuple[int, ...]
    like: tuple[int, ...]
    shares: tuple[float, ...]

    def sum(self, costs: Sequence[Cost]) -> Cost:
        """Return the cost of all blocks from those of the probed ones."""
        total = Cost()
        for other, share in zip(self.like, self.shares):
            total += costs[self.probed.index(other)] * share
        return total


def kinds_of(streamed: StreamedModel, resolved: ResolvedRecipe) -> Kinds:
    """Return the kinds of blocks of a model under a recipe."""
    found: dict[Any, int] = {}
    keys, sizes = [], []
    for index in range(len(streamed.blocks)):
        prefix = f"{streamed.block_name(index)}."
        shapes = [(name.removeprefix(prefix), streamed.shape(name)) for name in streamed.block_tensors(index)]
        formats = [resolved.formats.get(site.layer) for site in streamed.sites(index)]
        keys.append((tuple(shapes), tuple(formats)))
        sizes.append(sum(math.prod(shape) for _, shape in shapes))
        if len(found) < _KINDS:
            found.setdefault(keys[-1], index)
    like = tuple(found.get(key, 0) for key in keys)
    shares = tuple(size / sizes[other] for size, other in zip(sizes, like))
    return Kinds(tuple(found.values()), like, shares)


@dataclass
class Trial:
    """One run of the recipe on the probed blocks, without held-out windows.

    Attributes:
        windows: calibration windows.
        outside: cost outside of blocks.
        inside: cost of every probed block.
        memory_bytes: peak memory.
    """

    windows: int
    outside: Cost
    inside: list[Cost]
    memory_bytes: int


def try_recipe(prepared: PreparedJob, data: JobData, kinds: Kinds, sink: MemorySink, windows: int) -> Trial:
    """Quantize the probed blocks with some of the windows.

    Args:
        prepared: the job, with a recipe.
        data: all tokens.
        kinds: the blocks to quantize.
        sink: receives them.
        windows: calibration windows; 0 where the recipe reads none.
    """
    assert prepared.resolved is not None
    view, clock = TimedBlocks(prepared.streamed, kinds.probed), Clock()
    fewer = JobData(None if data.windows is None else data.windows[:windows])
    with PeakMemory() as memory, clock.measure("all"):
        run(Job(view, prepared.resolved, fewer, prepared.request.propagate), sink)
    return Trial(windows, clock.costs["all"] - sum(view.costs, Cost()), view.costs, memory.size_bytes)


@dataclass
class HeldOut:
    """Cost of measuring on the held-out windows.

    Attributes:
        inside: cost of passing them through every probed block.
        outside: cost of comparing predictions.
        memory_bytes: peak memory.
        quality: figures that mean nothing, with the keys of the measured ones.
    """

    inside: list[Cost]
    outside: Cost = field(default_factory=Cost)
    memory_bytes: int = 0
    quality: dict[str, Any] = field(default_factory=dict)


def try_measuring(prepared: PreparedJob, data: JobData, kinds: Kinds) -> HeldOut:
    """Measure on one held-out window, of sentences on the fewest that can be compared; the cost is that of all."""
    if data.held_out is None:
        return HeldOut([Cost() for _ in kinds.probed])
    streamed = prepared.streamed
    count = 1 if streamed.task.generates else MIN_SENTENCES
    start = max(0, len(data.held_out) // 2 - count)  # sentences are sorted by length
    few = data.held_out[start : start + count]
    times = sum(map(len, data.held_out)) / sum(map(len, few))
    view, costs, clock = SomeBlocks(streamed, kinds.probed), [], Clock()
    with PeakMemory() as memory:
        with view.non_block_weights("embedding"):
            metrics = HeldOutMetrics(view, few, ReferenceRecorder() if streamed.task.generates else None)
        for index in range(len(view.blocks)):
            block = view.load_block(index)
            metrics.quantized.advance(block, index)  # after loading, the first pass is slower
            began = now()
            metrics.float.advance(block, index)
            metrics.quantized.advance(block, index)  # a second time, for other predictions than the float model's
            costs.append((now() - began) * times)
            view.free_block(index)
        with view.non_block_weights("head"), clock.measure("head"):
            quality = metrics.result()
    states = (
        0 if data.windows is None else data.windows.numel() * metrics.float.batches[0].shape[-1] * _FLOAT_BYTES
    )
    return HeldOut(costs, clock.costs["head"] * times, memory.size_bytes + states, quality)


def second_size(first: Trial, seqlen: int, total: int) -> int:
    """Return the windows of the second probe: all, or as many as take about SECONDS.

    Args:
        first: the first probe, with one batch of windows.
        seqlen: tokens of a window.
        total: all windows.
    """
    batch = max(1, BATCH_TOKENS // seqlen)
    seconds = sum(first.inside, Cost()).seconds
    batches = max(2, int(SECONDS / max(seconds, 1e-3)))
    return min(total, batches * batch)


def first_size(seqlen: int, total: int) -> int:
    """Return the windows of the first probe, one batch."""
    return min(total, max(1, BATCH_TOKENS // seqlen))


def extrapolate(first: Trial, second: Trial, windows: int) -> Trial:
    """Return the trial with more windows: costs and memory are straight lines through two trials."""
    if second.windows in (first.windows, windows):
        return second
    times = (windows - second.windows) / (second.windows - first.windows)
    inside = [two + (two - one) * times for one, two in zip(first.inside, second.inside)]
    memory = second.memory_bytes + max(0, second.memory_bytes - first.memory_bytes) * times
    return replace(
        second,
        windows=windows,
        outside=second.outside + (second.outside - first.outside) * times,
        inside=inside,
        memory_bytes=int(memory),
    )


def try_blocks(prepared: PreparedJob, data: JobData, kinds: Kinds, sink: MemorySink) -> Trial:
    """Try the recipe with one batch of windows and with more, and return the trial with all of them.

    Args:
        prepared: the job, with a recipe.
        data: all tokens.
        kinds: the blocks to quantize.
        sink: receives the blocks.
    """
    if data.windows is None:
        try_recipe(_without_head(prepared), data, kinds, MemorySink(), 0)  # what happens once in a process
        return try_recipe(prepared, data, kinds, sink, 0)
    total, seqlen = data.windows.shape
    kept = MemorySink()
    first = try_recipe(prepared, data, kinds, kept, first_size(seqlen, total))
    if first.windows == total and sum(first.inside, Cost()).seconds > _LONG_S:
        return _written(first, kept, sink, SomeBlocks(prepared.streamed, kinds.probed))
    # what happens once in a process is left out of the second trial
    second = try_recipe(prepared, data, kinds, sink, second_size(first, seqlen, total))
    return extrapolate(first, second, total)


def short_trial(prepared: PreparedJob, data: JobData) -> Cost:
    """Return about the cost of all blocks, from one batch of windows; windows scale all of it."""
    kinds = kinds_of(prepared.streamed, prepared.resolved) if prepared.resolved else Kinds((), (), ())
    total, windows = 0, 0
    if data.windows is not None:
        total, windows = len(data.windows), first_size(data.windows.shape[1], len(data.windows))
    trial = try_recipe(_without_head(prepared), data, kinds, MemorySink(), windows)
    return kinds.sum(trial.inside) * (total / windows if windows else 1)


def _without_head(prepared: PreparedJob) -> PreparedJob:
    """Return the job with embedding and head in float."""
    assert prepared.resolved is not None
    return replace(prepared, resolved=replace(prepared.resolved, ends=None, head_formats={}))


def _written(trial: Trial, kept: MemorySink, sink: MemorySink, view: SomeBlocks) -> Trial:
    """Pass the results of a trial on to another sink, and return the trial with the cost of that."""
    if kept.parts:
        sink.share(kept.parts)
    inside = list(trial.inside)
    for result in kept.results:
        began = now()
        sink.write(result, view)
        if result.index != NON_BLOCK:
            inside[result.index] += now() - began
    return replace(trial, inside=inside)


@contextmanager
def probe_folder(path: Path, prepared: PreparedJob, identity: dict[str, Any]) -> Iterator[FolderSink]:
    """Open a sink that writes into a folder of its own, with all files but the weights."""
    work = WorkFolder(path)
    try:
        sink = FolderSink(work, prepared.resolved, identity, len(prepared.streamed.blocks), resume=False)
        sink.prepare(prepared.streamed)
        sink.begin()
        yield sink
    finally:
        work.close()
