"""The loop over the blocks of a model: load a block, quantize it, pass it to the sink, feed the next one.

Nothing here depends on an architecture (see adapters), a method (see recipes) or a file layout (see sinks).
Later blocks are calibrated on the outputs of earlier ones *as stored*, that is with decoded weights; or, if the
job requests it, on the hidden states of the float model, so that several recipes can share the statistics.
"""

from __future__ import annotations

from typing import Any

import torch

from bitmill.architectures.attention import enable_rounded_attention, round_attention
from bitmill.architectures.inputs import hook_inputs
from bitmill.calibration.streams import Streams
from bitmill.calibration.walk import walk_blocks
from bitmill.errors import RecipeError
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.block import quantize_block
from bitmill.pipeline.embeddings import QuantizedEmbeddings, quantize_embeddings
from bitmill.pipeline.inputs import (
    BlockInputs,
    compares_with_float,
    fisher_for_job,
    needs_streams,
    open_store,
    output_gradients_for_job,
    read_stored,
)
from bitmill.pipeline.job import BlockResult, Job, Sink
from bitmill.pipeline.measure import HeldOutMetrics
from bitmill.pipeline.shared import learn_shared_parts
from bitmill.progress import Progress

QUANTIZING = "quantize"  # name of the task in the progress


@torch.no_grad()
def run(job: Job, sink: Sink, progress: Progress | None = None) -> dict[str, Any]:
    """Quantize every block of a model.

    Args:
        job: the model, the scheme of every layer, and the data.
        sink: receives finished blocks, and supplies those that an earlier run finished.
        progress: where progress is reported.

    Returns:
        The figures measured on the held-out windows; empty without them.

    Raises:
        RecipeError: If the recipe needs calibration windows and the job has none.
    """
    progress = progress or Progress()
    if job.needs and job.calibration is None:
        raise RecipeError(f"The recipe {job.recipe.name!r} needs calibration text; give it some with --calib.")
    if job.recipe.attention:
        enable_rounded_attention(job.streamed.model)
    store = open_store(job)
    shared = learn_shared_parts(job, sink, progress)
    with (
        fisher_for_job(job, sink, progress) as fisher,
        output_gradients_for_job(job, sink, progress) as gradients,
    ):
        embeddings = quantize_embeddings(job, sink, progress)
        with job.streamed.non_block_weights("embedding"):
            streams = None
            if needs_streams(job, store):
                assert job.calibration is not None
                compare = job.propagate == "float" or compares_with_float(job)
                streams = Streams(job.streamed, job.calibration, compare)
            metrics = (
                None
                if job.held_out is None
                else HeldOutMetrics(job.streamed, job.held_out, job.recorder, job.data.domains)
            )
            if embeddings:
                _embed_again(job, embeddings, streams, metrics)
        _quantize_blocks(job, sink, BlockInputs(streams, store, fisher, shared, gradients), metrics, progress)
    if metrics is None:
        return {}
    with job.streamed.non_block_weights("head"):
        return metrics.result(embeddings, progress)


def _embed_again(
    job: Job, embeddings: QuantizedEmbeddings, streams: Streams | None, metrics: HeldOutMetrics | None
) -> None:
    """Restart the streams of the quantized model with the quantized embeddings."""
    embeddings.put_embedding()
    if streams and job.propagate == "quantized":
        streams.hidden.embed(embeddings.put_embedding)
    if metrics:
        metrics.quantized.embed(embeddings.put_embedding)


def _quantize_blocks(
    job: Job, sink: Sink, inputs: BlockInputs, metrics: HeldOutMetrics | None, progress: Progress
) -> None:
    """Quantize every block, or restore it where the sink holds it, and let the hidden states pass it."""
    progress.start(QUANTIZING, len(job.streamed.blocks))
    for index, block in walk_blocks(job.streamed, progress):
        if metrics:
            metrics.float.advance(block, index)
        finished = sink.finished(index)
        if finished is None:
            sink.write(quantize_block(job, block, index, inputs), job.streamed)
        else:
            float_outputs = inputs.streams.float_outputs(block, index) if inputs.streams else []
            _restore(finished, job.streamed)
            if job.recipe.attention:
                round_attention(block, job.recipe.attention.roundings(index))
            if inputs.streams:
                inputs.streams.advance(block, index, float_outputs, follow_float=job.propagate == "float")
            else:
                read_stored(job, inputs.store, index)  # its largest hidden state counts
        if metrics:
            metrics.quantized.advance(block, index)
    progress.finish()


def _restore(finished: BlockResult, streamed: StreamedModel) -> None:
    """Give a block in memory the weights with which it was finished."""
    for name, tensor in finished.changed.items():
        if streamed.is_parameter(name):
            streamed.set_parameter(name, tensor.to(streamed.device, torch.float32))
    for name, layer in finished.layers.items():
        streamed.set_matrix(f"{name}.weight", layer.quantized.dequantize())
        hook_inputs(streamed.model.get_submodule(name), layer.quantized.rounding)
