"""Quantize the token embeddings and the head of a model.

Calibration text gives no statistics for a table that is only looked up, so both are rounded to nearest, with
ranges of least squared error. Blocks are calibrated on the output of the stored table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitmill.evaluation.logits import DeferredLogits, Output
from bitmill.formats import Format
from bitmill.formats.quantized import row_slices
from bitmill.models.embedding_and_head import EmbeddingAndHead
from bitmill.models.meta import trim_malloc
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import NON_BLOCK, BlockResult, Job, LayerResult, Sink
from bitmill.pipeline.ranges import check_range
from bitmill.progress import Progress
from bitmill.solvers import SOLVERS, Statistics
from bitmill.solvers.base import solve, squared_norm


class QuantizedEmbeddings:
    """The quantized embedding and head of a model, to compute with in place of the float ones."""

    def __init__(self, streamed: StreamedModel, paths: EmbeddingAndHead, layers: dict[str, LayerResult]) -> None:
        """Keep the quantized layers.

        Args:
            streamed: the model.
            paths: where embedding and head are in it.
            layers: the quantized layers, by path.
        """
        self._streamed, self._paths, self._layers = streamed, paths, layers

    def put_embedding(self) -> None:
        """Put the decoded table, if it is quantized, in place of the float one; needs the side "embedding"."""
        if not self._paths.embedding:
            return
        decoded = self._layers[self._paths.embedding].quantized.dequantize()
        name = f"{self._paths.embedding}.weight"
        shape = self._streamed.shape(self._paths.stored_name(self._paths.embedding, self._streamed))
        self._streamed.set_parameter(name, decoded.view(shape).to(self._streamed.device))

    @contextmanager
    def head(self) -> Iterator[None]:
        """Compute with the quantized head in place of the float one; needs the side "head".

        It is decoded in slices of rows, so that no second matrix of its size is in memory.
        """
        if not self._paths.head:
            yield
            return
        module = self._streamed.model.get_submodule(self._paths.head)
        assert isinstance(module, nn.Linear)
        quantized = self._layers[self._paths.embedding if self._paths.tied else self._paths.head].quantized
        sizes = row_slices(quantized.shape)
        pieces = quantized.split(sizes)

        def forward(x: Tensor) -> Tensor:
            y = x.new_empty(*x.shape[:-1], quantized.shape[0])
            for piece, out in zip(pieces, y.split(sizes, -1)):
                out.copy_(nn.functional.linear(x, piece.dequantize().to(x)))
            return y if module.bias is None else y.add_(module.bias)

        vars(module)["forward"] = forward
        try:
            yield
        finally:
            vars(module).pop("forward")

    def deferred_head(self, tokens: Tensor, hidden: Tensor) -> Output:
        """Return `StreamedModel.deferred_head` with the quantized head in place of the float one."""
        with self.head():
            output = self._streamed.deferred_head(tokens, hidden)
        if isinstance(output, Tensor):
            return output

        def read(window: int, positions: slice) -> Tensor:
            with self.head():
                return output[window, positions]

        return DeferredLogits(read)


def quantize_embeddings(job: Job, sink: Sink, progress: Progress) -> QuantizedEmbeddings | None:
    """Quantize embedding and head, unless an earlier run did.

    Args:
        job: the model and the recipe.
        sink: receives the result, or supplies that of an earlier run.
        progress: where progress is reported.

    Returns:
        None where they stay in float.
    """
    paths, formats, streamed = job.resolved.ends, job.resolved.head_formats, job.streamed
    if paths is None:
        return None
    result = sink.finished(NON_BLOCK)
    if result is None:
        progress.start("embedding and head", len(paths.layers))
        result = BlockResult(NON_BLOCK)
        for layer in paths.layers:
            W = streamed.finite_tensor(paths.stored_name(layer, streamed)).flatten(1)
            check_range(layer, W, formats[layer])
            result.layers[layer] = round_to_nearest(formats[layer], W)
            trim_malloc()
            progress.advance()
        sink.write(result, streamed)
        progress.finish()
    return QuantizedEmbeddings(streamed, paths, result.layers)


@torch.no_grad()
def round_to_nearest(format: Format, W: Tensor) -> LayerResult:
    """Round a matrix (rows, columns), with ranges of least squared error."""
    nearest = SOLVERS.from_dict({"solver": "nearest", "search": True})
    quantized = solve(nearest, W, Statistics(), format)
    error = total = 0.0
    sizes = row_slices(quantized.shape)
    for part, piece in zip(W.split(sizes), quantized.split(sizes)):
        error += squared_norm(part - piece.dequantize())
        total += squared_norm(part)
    return LayerResult(quantized, error / total if total else error, None)
