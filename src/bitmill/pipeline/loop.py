"""The loop: load a block, quantize it, hand it to the sink, feed the next.

Nothing here knows an architecture (adapters do), a method (recipes do) or a file layout (sinks do).
Later blocks are calibrated on the outputs of earlier ones *as stored*, that is of the decoded codes; or, when
the job says so, on what the float model has there, so that many recipes can share the statistics.
"""

from __future__ import annotations

from typing import Any

import torch

from bitmill.calibration.fisher import Fisher
from bitmill.calibration.store import StatisticsStore
from bitmill.calibration.streams import Streams
from bitmill.calibration.walk import walk_blocks
from bitmill.data.text import windows_hash
from bitmill.errors import RecipeError
from bitmill.formats import Params
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import FISHER
from bitmill.pipeline.block import quantize_block
from bitmill.pipeline.embeddings import quantize_embeddings
from bitmill.pipeline.fisher_job import fisher_for_job
from bitmill.pipeline.job import BlockResult, Job, Sink
from bitmill.pipeline.measure import HeldOutMetrics
from bitmill.pipeline.shared import learn_shared_parts
from bitmill.progress import Progress
from bitmill.tuners.base import TARGETS
from bitmill.version import __version__


@torch.no_grad()
def run(job: Job, sink: Sink, progress: Progress | None = None) -> dict[str, Any]:
    """Quantize every block. Returns the measured quality on the held-out windows (empty without them)."""
    progress = progress or Progress()
    recipe = job.recipe
    if recipe.needs and job.calibration is None:
        raise RecipeError(f"The recipe {recipe.name!r} needs calibration text; give it some with --calib.")
    store = _store(job)
    shared = learn_shared_parts(job, sink, progress)
    with fisher_for_job(job, sink, progress) as fisher:
        return _run(job, sink, progress, store, fisher, shared)


def _run(
    job: Job,
    sink: Sink,
    progress: Progress,
    store: StatisticsStore | None,
    fisher: Fisher | None,
    shared: dict[str, Params],
) -> dict[str, Any]:
    streamed = job.streamed
    streams = measure = None
    embeddings = quantize_embeddings(job, sink, progress)
    with streamed.non_block_weights("embedding"):
        if _needs_streams(job, store):
            assert job.calibration is not None
            streams = Streams(streamed, job.calibration, job.propagate == "float" or _compares(job))
        if job.held_out is not None:
            measure = HeldOutMetrics(streamed, job.held_out)
        if embeddings:  # until here the float model's own embeddings were read
            embeddings.put_embedding()
            if streams and job.propagate != "float":
                streams.hidden.embed()
            if measure:
                measure.quantized.embed()

    progress.start("quantize", len(streamed.blocks))
    for index, block in walk_blocks(streamed, progress):
        if measure:
            measure.float.advance(block, index)
        done = sink.finished(index)
        if done is not None:
            targets = streams.float_outputs(block, index) if streams else []
            _restore(done, streamed)
            if streams:
                streams.advance(block, index, targets, follow_float=job.propagate == "float")
        else:
            sink.write(quantize_block(job, block, index, streams, store, fisher, shared), streamed)
        if measure:
            measure.quantized.advance(block, index)
    progress.finish()
    if measure is None:
        return {}
    with streamed.non_block_weights("head"):
        return measure.result(embeddings)


def _store(job: Job) -> StatisticsStore | None:
    """The shared statistics, which only the float model's can be."""
    if job.statistics is None or not job.recipe.needs:
        return None
    if job.propagate != "float":
        raise RecipeError(
            "Statistics can be shared only when the float model's are propagated; use propagate=float."
        )
    assert job.calibration is not None
    identity = {
        "model": job.streamed.source.fingerprint(),
        "windows": windows_hash(job.calibration),
        "device": str(job.streamed.device),
        "versions": [__version__, torch.__version__],
    }
    return StatisticsStore(job.statistics, identity)


def _needs_streams(job: Job, store: StatisticsStore | None) -> bool:
    """Whether calibration text has to travel through the blocks."""
    needs = job.recipe.needs - FISHER  # which has a pass of its own
    if not needs:
        return False
    stored = store is not None and all(store.has(i) for i in range(len(job.streamed.blocks)))
    return not stored or _compares(job)


def _compares(job: Job) -> bool:
    """Whether somebody looks at the float model's hidden states beside those of the quantized one."""
    beside = TARGETS if job.propagate == "float" else TARGETS | {"cross"}
    return bool(job.recipe.needs & beside)


def _restore(done: BlockResult, streamed: StreamedModel) -> None:
    """Bring a block to the state in which it was finished."""
    for name, tensor in done.changed.items():
        if streamed.is_parameter(name):
            streamed.set_parameter(name, tensor.to(streamed.device, torch.float32))
    for name, layer in done.layers.items():
        streamed.set_matrix(f"{name}.weight", layer.quantized.dequantize())
