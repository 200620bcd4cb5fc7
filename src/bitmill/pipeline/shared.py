"""Learn the parts that all layers of a kind share, before the first block is quantized.

The float model is walked once, with the calibration windows where the recipe needs statistics. Each linear is
passed to the learner of its kind as its solver would receive it, after the transforms and wrappers of its scheme;
a learner keeps little of a layer.
"""

from __future__ import annotations

from torch import nn

from bitmill.calibration.collect import collect_statistics, find_stages
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

_FLOAT_STATISTICS = {"gram", "cross", "activations"}  # those that a pass of the float model collects


def learn_shared_parts(job: Job, sink: Sink, progress: Progress) -> dict[str, Params]:
    """Return the parts that layers share, learned now unless an earlier run did; the sink keeps them.

    Args:
        job: the model, the scheme of every layer, and the data.
        sink: where packed parts are kept.
        progress: where progress is reported.

    Returns:
        Kind of layer (path of the linear in its block) -> shared parts; empty where no format shares parts.
    """
    schemes = _sharing_schemes(job)
    if not schemes:
        return {}
    packed = sink.shared()
    if packed is None:
        learned = _learn(job, schemes, progress)
        packed = {
            shared_module_path(kind): schemes[kind].format.pack_shared(params) for kind, params in learned.items()
        }
        sink.share(packed)
    parts = {}
    for kind, scheme in schemes.items():
        unpacked = scheme.format.unpack_shared(packed[shared_module_path(kind)])
        parts[kind] = {name: value.to(job.streamed.device) for name, value in unpacked.items()}
    return parts


def _layers(job: Job, kind: str) -> list[str]:
    """Return the full names of the quantized layers of a kind."""
    layers = [f"{job.streamed.block_name(index)}.{kind}" for index in range(len(job.streamed.blocks))]
    return [layer for layer in layers if job.quantizes(layer)]


def _sharing_schemes(job: Job) -> dict[str, LayerScheme]:
    """Return the scheme of every kind of layer whose format shares parts; all layers of a kind have one scheme."""
    schemes = {
        kind: job.scheme(layers[0]) for kind in job.streamed.adapter.linears if (layers := _layers(job, kind))
    }
    return {kind: scheme for kind, scheme in schemes.items() if scheme.format.shared}


def _learn(job: Job, schemes: dict[str, LayerScheme], progress: Progress) -> dict[str, Params]:
    """Return the shared parts of every kind."""
    streamed, learners = job.streamed, dict[str, Learner]()
    for kind, scheme in schemes.items():
        learner = scheme.solver.learner(scheme.weight.core, len(_layers(job, kind)))
        assert learner is not None  # the recipe has checked
        learners[kind] = learner
    progress.start("shared codebooks", len(streamed.blocks) + len(learners))
    streams = None
    if job.calibration is not None and job.needs & _FLOAT_STATISTICS:
        with streamed.non_block_weights("embedding"):
            streams = Streams(streamed, job.calibration, compare=False)
    for index, block in walk_blocks(streamed, progress):
        _add_layers(job, block, index, streams, learners)
    learned = {}
    for kind in list(learners):
        learned[kind] = learners.pop(kind).learn()
        progress.advance()
    progress.finish()
    return learned


def _add_layers(
    job: Job, block: nn.Module, index: int, streams: Streams | None, learners: dict[str, Learner]
) -> None:
    """Pass the linears of one block to the learners, and the calibration windows through the block."""
    streamed = job.streamed
    stages, collected = [list(stage) for stage in streamed.adapter.stages], {}
    if streams:
        stages = find_stages(streamed.adapter, block, *streams.first_window(index), job.kept(index))
        leads = [stage[0] for stage in stages]
        collected = collect_statistics(block, streams.hidden.batches, streams.calls(index), leads)
        streams.advance(block, index, [])
    fold_transforms(job, index, collected)
    for stage in stages:
        stats = collected.get(stage[0], Statistics())
        for kind in stage:
            layer = f"{streamed.block_name(index)}.{kind}"
            if kind in learners and job.quantizes(layer):
                W = streamed.matrix(f"{layer}.weight")
                learners[kind].add_layer(*reduce_to_core(W, stats, job.scheme(layer).format))
