"""What all layers of a kind share, learned before the first block is quantized.

The float model goes by once, one block in memory at a time, with the calibration text beside it where the recipe
needs statistics. Each linear is shown to the learner of its kind as its solver would be handed it, after the
transforms and wrappers of the recipe; what a learner keeps of a layer is small.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from bitmill.calibration.collect import collect_statistics
from bitmill.calibration.staged_forward import find_stages
from bitmill.calibration.streams import Streams
from bitmill.calibration.walk import walk_blocks
from bitmill.formats import Params
from bitmill.formats.quantized import shared_module_path
from bitmill.formats.wrapper import reduce_to_core
from bitmill.pipeline.fold import fold_transforms
from bitmill.pipeline.job import Job, Sink
from bitmill.progress import Progress
from bitmill.solvers import Learner, Statistics

_OBSERVED = {"gram", "cross", "activations"}  # of what calibration may collect, what a float pass can see


def learn_shared_parts(job: Job, sink: Sink, progress: Progress) -> dict[str, Params]:
    """Kind (the path of a linear in its block) -> parts that its layers share; the sink keeps them.

    Empty where the recipe's format shares nothing.
    """
    format = job.recipe.stored
    if not format.shared:
        return {}
    kept = sink.shared()
    if kept is None:
        learned = _learn(job, progress)
        kept = {shared_module_path(kind): format.pack_shared(params) for kind, params in learned.items()}
        sink.share(kept)
    device = job.streamed.device
    parts = {kind: kept[shared_module_path(kind)] for kind in _kinds(job)}
    return {
        kind: {name: value.to(device) for name, value in format.unpack_shared(tensors).items()}
        for kind, tensors in parts.items()
    }


def _kinds(job: Job) -> Counter[str]:
    """How many layers of each kind are quantized."""
    names = [job.streamed.block_name(index) for index in range(len(job.streamed.blocks))]
    linears = job.streamed.adapter.linears
    return Counter(kind for kind in linears for name in names if job.quantizes(f"{name}.{kind}"))


def _learn(job: Job, progress: Progress) -> dict[str, Params]:
    streamed, recipe = job.streamed, job.recipe
    learners: dict[str, Learner] = {}
    for kind, layers in _kinds(job).items():
        learner = recipe.solver.learner(recipe.weight.core, layers)
        assert learner is not None  # the recipe has asked
        learners[kind] = learner
    progress.start("what layers share", len(streamed.blocks) + len(learners))
    streams = None
    if job.calibration is not None and recipe.needs & _OBSERVED:
        with streamed.non_block_weights("embedding"):
            streams = Streams(streamed, job.calibration, compare=False)
    for index, block in walk_blocks(streamed, progress):
        _show(job, block, index, streams, learners)
    learned = {}
    for kind in list(learners):
        learned[kind] = learners.pop(kind).learn()
        progress.advance()
    progress.finish()
    return learned


def _show(job: Job, block: nn.Module, index: int, streams: Streams | None, learners: dict[str, Learner]) -> None:
    """Let the learners see the linears of one block, and move the stream past it."""
    streamed = job.streamed
    stages, seen = [list(stage) for stage in streamed.adapter.stages], {}
    if streams:
        stages = find_stages(streamed.adapter, block, *streams.first_window(index))
        leads = [stage[0] for stage in stages]
        seen = collect_statistics(block, streams.hidden.batches, streams.calls(index), leads)
        streams.advance(block, index, [])
    fold_transforms(job, index, seen)
    for stage in stages:
        stats = seen.get(stage[0], Statistics())
        for kind in stage:
            name = f"{streamed.block_name(index)}.{kind}"
            if job.quantizes(name):
                W, format = streamed.matrix(f"{name}.weight"), job.scheme(name).format
                learners[kind].add_layer(*reduce_to_core(W, stats, format))
