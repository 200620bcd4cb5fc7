"""KL divergence of the final logits when embedding or head alone are rounded; measured for every candidate."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill.calibration.streams import BATCH_TOKENS
from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.formats import Format
from bitmill.models.embedding_and_head import EmbeddingAndHead
from bitmill.pipeline.embeddings import QuantizedEmbeddings, round_to_nearest
from bitmill.pipeline.job import NON_BLOCK
from bitmill.sensitivities.base import Run
from bitmill.sensitivities.candidate import Candidate, Unit
from bitmill.sensitivities.divergence import Divergences
from bitmill.sensitivities.kl import KL
from bitmill.sensitivities.store import Costs, CostStore


@torch.no_grad()
def measure_ends(
    run: Run, ends: EmbeddingAndHead, units: Sequence[Unit], candidates: dict[str, Sequence[Candidate]]
) -> tuple[Costs, float]:
    """Measure the units outside the blocks, one layer each; what the folder of the run holds is kept.

    Args:
        run: the model and the text.
        ends: embedding and head.
        units: one for each of them with a matrix of its own.
        candidates: name of a unit -> its candidates.

    Returns:
        Name of a unit -> key of a candidate -> divergence; and the seconds it took.
    """
    began, options = time.perf_counter(), KL()
    store = CostStore(run.folder, options)
    known = store.load(NON_BLOCK)
    windows = run.windows[: options.windows, : options.tokens]
    for unit in units:
        missing = {
            candidate.key: candidate.format
            for candidate in candidates[unit.name]
            if candidate.format is not None and candidate.key not in known.get(unit.name, {})
        }
        if missing:
            found = _divergences(run, ends.only(unit.layers), unit.layers[0], list(missing.values()), windows)
            store.save(NON_BLOCK, {unit.name: dict(zip(missing, found))})
    return {unit.name: store.load(NON_BLOCK).get(unit.name, {}) for unit in units}, time.perf_counter() - began


def _divergences(
    run: Run, ends: EmbeddingAndHead, layer: str, formats: Sequence[Format], windows: Tensor
) -> list[float]:
    """Return the divergence with the layer in each of the formats."""
    streamed, divergences = run.streamed, Divergences(run.streamed, windows)
    W = streamed.finite_tensor(ends.stored_name(layer, streamed))
    rounded = [QuantizedEmbeddings(streamed, ends, {layer: round_to_nearest(format, W)}) for format in formats]
    del W
    streams = []
    for quantized in rounded:
        with streamed.non_block_weights("embedding"):
            quantized.put_embedding()
            streams.append(HiddenStates(streamed, windows.split(max(1, BATCH_TOKENS // windows.shape[1]))))
    for index, block in walk_blocks(streamed):
        for stream in streams:
            stream.advance(block, index)
    hidden = [torch.cat(stream.batches) for stream in streams]
    return divergences.compare(hidden, [quantized.head for quantized in rounded])
