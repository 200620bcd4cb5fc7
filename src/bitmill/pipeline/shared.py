"""What all layers of a kind share, learned before the first block is quantized.

The float model goes by once, one block in memory at a time, with the calibration text beside it where the recipe
needs statistics. Each linear is shown to the learner of its kind as its solver would be handed it, after the
transforms and wrappers of the recipe; what a learner keeps of a layer is small.
"""

from __future__ import annotations

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
from bitmill.recipes.scheme import LayerScheme
from bitmill.solvers import Learner, Statistics

_OBSERVED = {"gram", "cross", "activations"}  # of what calibration may collect, what a float pass can see


def learn_shared_parts(job: Job, sink: Sink, progress: Progress) -> dict[str, Params]:
    """Learn the parts that layers share across blocks, or read what an earlier run learned.

    Returns:
        Path of a linear in its block -> the parts that its layers share; empty where no format shares any.
    """
    sharing = _sharing(job)
    if not sharing:
        return {}
    kept = sink.shared()
    if kept is None:
        learned = _learn(job, sharing, progress)
        kept = {shared_module_path(kind): sharing[kind][0].format.pack_shared(p) for kind, p in learned.items()}
        sink.share(kept)
    parts = {}
    for kind, (scheme, _) in sharing.items():
        unpacked = scheme.format.unpack_shared(kept[shared_module_path(kind)])
        parts[kind] = {name: value.to(job.streamed.device) for name, value in unpacked.items()}
    return parts


def _sharing(job: Job) -> dict[str, tuple[LayerScheme, int]]:
    """Return the scheme and the number of layers of every kind of linear whose layers share parts."""
    sharing: dict[str, tuple[LayerScheme, int]] = {}
    for kind in job.streamed.adapter.linears:
        names = [f"{job.streamed.block_name(index)}.{kind}" for index in range(len(job.streamed.blocks))]
        schemes = [job.scheme(name) for name in names if job.quantizes(name)]
        if schemes and schemes[0].format.shared:  # equal for all of them, which the recipe's resolution checked
            sharing[kind] = schemes[0], len(schemes)
    return sharing


def _learn(job: Job, sharing: dict[str, tuple[LayerScheme, int]], progress: Progress) -> dict[str, Params]:
    streamed = job.streamed
    learners: dict[str, Learner] = {}
    for kind, (scheme, layers) in sharing.items():
        learner = scheme.solver.learner(scheme.weight.core, layers)
        assert learner is not None  # the recipe has checked that
        learners[kind] = learner
    progress.start("shared codebooks", len(streamed.blocks) + len(learners))
    streams = None
    if job.calibration is not None and job.recipe.needs & _OBSERVED:
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
            if kind in learners and job.quantizes(name):
                W, format = streamed.matrix(f"{name}.weight"), job.scheme(name).format
                learners[kind].add_layer(*reduce_to_core(W, stats, format))
