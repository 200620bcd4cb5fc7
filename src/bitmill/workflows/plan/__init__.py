"""What fits: bytes of weights, of keys and values and of activations, from a model's config alone.

    on each device = ceil((weights + cache) / devices) + activations
    longest        = the most tokens for which that is within the memory

Capacity is all this says. What a model is worth at that size is measured, or it is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.errors import SourceError, UsageError
from bitmill.evaluation.generate import CHUNK
from bitmill.models.config_only import open_config_only
from bitmill.models.kv_shapes import CachedLayer, cached_layers, check_key_widths
from bitmill.models.streamed import StreamedModel
from bitmill.sources.base import Source
from bitmill.workflows.plan.cache import Cache, caches
from bitmill.workflows.plan.weights import Wanted, weight_rows

_UNBOUNDED = 1 << 40
_UNTOLD = 4096  # tokens, where a config does not say how many the model was trained for

__all__ = ["Wanted", "plan"]


@dataclass(frozen=True)
class Activations:
    """What a forward needs beside weights and cache, on every device, in fp16; logits in fp32.

    a_token: input and residual of one block and the outputs of all its linears.  logits: of the last tokens.
    """

    a_token: int
    logits: int

    def of(self, tokens: int) -> int:
        """Bytes for so many tokens of every row at a time."""
        return self.a_token * tokens + self.logits


def plan(
    model: str | Path,
    *,
    context: int | None = None,
    memory: int | None = None,
    devices: int = 1,
    batch: int = 1,
    weights: Wanted | None = None,
    kv: str | None = None,
    kv_bits: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What a model takes at `context` tokens, and the longest context in `memory` bytes on each of `devices`.

    model: whatever names a model elsewhere; also a folder with a config.json alone, or `llama-7b`.
    context: tokens of each of `batch` rows; as many as the model was trained for when left out.
    weights: how they are to be stored; as they are when left out.
    kv, kv_bits: of keys and values, `NAME` or `NAME:key=value,...`; fp16 when left out.

    Nothing is read but configs and headers. Returns plain data; every figure but `measured` is computed.
    Raises BitmillError subclasses, each with one sentence.
    """
    for name, given in (("context", context), ("gpus", devices), ("batch", batch)):
        if given is not None and given < 1:
            raise UsageError(f"--{name} is {given}; use at least 1.")
    source = open_config_only(model, trust_remote_code=trust_remote_code)
    layers = cached_layers(source.config, source.name)
    known, cache = caches(layers, batch, kv, kv_bits)
    streamed = _streamed(source, layers)
    rows = weight_rows(model, source, streamed, weights or Wanted())
    weight = next(row for row in rows if row["chosen"])
    trained = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = context or trained or _UNTOLD
    activations = _activations(source, streamed, batch)

    def needed(weight: int, cache: int, tokens: int) -> int:
        return -(-(weight + cache) // devices) + activations.of(min(tokens, CHUNK))

    def longest(row: dict[str, Any], one: Cache) -> dict[str, Any]:
        most = _longest(lambda n: needed(row["size_bytes"], one.size(n).total, n), memory or 0)
        return {"weights": row["name"], "method": one.name, "bits": one.bits, "tokens": most}

    in_use = needed(weight["size_bytes"], cache.size(tokens).total, tokens)
    return {
        "model": str(model),
        "layers": [vars(layer) for layer in layers],
        "context": tokens,
        "trained_context": trained,
        "batch": batch,
        "devices": devices,
        "memory_bytes": memory,
        "weights": rows,
        "note": streamed if isinstance(streamed, str) else None,
        "cache": [one.row(tokens, one is cache) for one in known],
        "activations": {
            "chunk": CHUNK,
            "prompt_bytes": activations.of(min(tokens, CHUNK)),
            "decode_bytes": activations.of(1),
            "prompt_at_once_bytes": activations.of(tokens),
            "float_layer_bytes": max(4 * batch * layer.num_elements(tokens) for layer in layers),
        },
        "needed_bytes": in_use,
        "fits": None if memory is None else in_use <= memory,
        "longest": [longest(row, one) for row in rows for one in known] if memory is not None else [],
        "measured": open_checkpoint(model).report["measured"] if is_checkpoint(Path(model)) else [],
    }


def _streamed(source: Source, layers: tuple[CachedLayer, ...]) -> StreamedModel | str:
    """The skeleton, or why the model's weights cannot be quantized."""
    try:
        streamed = StreamedModel(source)
    except SourceError as error:
        return str(error)
    check_key_widths(layers, streamed.model, source.name)
    return streamed


def _activations(source: Source, streamed: StreamedModel | str, batch: int) -> Activations:
    """Of one block; where it cannot be walked over, as if it were Llama's."""
    config = source.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    if isinstance(streamed, str):
        widths = 4 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    else:
        names = [f"{streamed.block_name(0)}.{linear}.weight" for linear in streamed.adapter.linears]
        widths = sum(streamed.shape(name)[1 if streamed.adapter.transposed else 0] for name in names)
    return Activations(2 * batch * (2 * hidden + widths), 4 * batch * config.vocab_size)


def _longest(needed: Callable[[int], int], memory: int) -> int | None:
    """The most tokens within the memory: 0 where one is too many, None where there is no limit."""
    if needed(1) > memory:
        return 0
    if needed(_UNBOUNDED) <= memory:
        return None
    fits, too_many = 1, _UNBOUNDED
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle) <= memory else (fits, middle)
    return fits
