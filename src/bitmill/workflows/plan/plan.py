"""Compute the memory that a model needs and the longest context that fits, from its config alone.

    on each device = ceil((weights + cache) / devices) + activations
    longest        = the most tokens for which that is within the memory

Only the capacity is computed; the quality at that size must be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.architectures.experts import expert_of
from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import SourceError, UsageError
from bitmill.evaluation.generate import PROMPT_CHUNK
from bitmill.kv.config import parse_kv_config
from bitmill.models.config_only import open_config_only
from bitmill.models.kv_shapes import CachedLayer, cached_layers, check_key_widths
from bitmill.models.streamed import StreamedModel
from bitmill.sources.base import Source
from bitmill.workflows.plan.cache import CacheStorage, cache_storages
from bitmill.workflows.plan.weights import WeightStorage, weight_rows

_UNBOUNDED = 1 << 40
_DEFAULT_CONTEXT = 4096  # tokens, for configs without a trained context


@dataclass(frozen=True)
class Activations:
    """Bytes of a forward pass without weights and cache, on every device, in fp16; logits in fp32.

    Attributes:
        per_token: input and residual of one block and the outputs of all its linears.
        logits: of the last tokens.
    """

    per_token: int
    logits: int

    def of(self, tokens: int) -> int:
        """Return the bytes for `tokens` tokens of every sequence at a time."""
        return self.per_token * tokens + self.logits


@dataclass(frozen=True)
class Devices:
    """Devices that share weights and cache evenly, each with its own activations."""

    count: int
    memory_bytes: int | None
    activations: Activations

    def needed(self, weight_bytes: int, cache_bytes: int, tokens: int) -> int:
        """Compute the bytes needed on each device.

        Args:
            weight_bytes: all weights.
            cache_bytes: keys and values of all sequences at this context.
            tokens: context of each sequence.
        """
        return -(-(weight_bytes + cache_bytes) // self.count) + self.activations.of(min(tokens, PROMPT_CHUNK))

    def longest(self, weight_bytes: int, cache: CacheStorage) -> int | None:
        """Compute the longest context.

        Args:
            weight_bytes: all weights.
            cache: storage of keys and values.

        Returns:
            Tokens per sequence: 0 where one does not fit, None where there is no limit.
        """
        memory = self.memory_bytes or 0
        return largest(lambda n: self.needed(weight_bytes, cache.size(n).total, n) <= memory)


@checked_arguments()
def plan(
    model: str | Path,
    *,
    context: int | None = None,
    memory: int | None = None,
    devices: int = 1,
    batch: int = 1,
    weights: WeightStorage | None = None,
    kv: str | None = None,
    kv_bits: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compute the bytes of a model at `context` tokens, and the longest context in `memory` bytes.

    Only configs and headers are read.

    Args:
        model: as for `quantize`; also a folder with only a config.json, or `llama-7b`.
        context: tokens of each of `batch` sequences; the trained context when left out.
        memory: bytes on each device.
        devices, batch: number of devices that share weights and cache evenly, and of sequences.
        weights: storage of the weights; as they are stored when left out.
        kv: method of keys and values, `NAME` or `NAME:key=value,...`; fp16 when left out.
        kv_bits: bits of keys and values.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        Plain data; every value but `measured` is computed.

    Raises:
        BitmillError: a subclass, with one sentence.
    """
    _check_positive(context=context, gpus=devices, batch=batch)
    source = open_config_only(model, trust_remote_code=trust_remote_code)
    layers = cached_layers(source.config, source.name)
    caches, cache = cache_storages(layers, batch, parse_kv_config(kv, kv_bits))
    streamed = _open_streamed(source, layers)
    rows = weight_rows(model, source, streamed, weights or WeightStorage())
    weight = next(row for row in rows if row["chosen"])
    trained = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = context or trained or _DEFAULT_CONTEXT
    pool = Devices(devices, memory, _activations(source, streamed, batch))
    needed = pool.needed(weight["size_bytes"], cache.size(tokens).total, tokens)
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
        "cache": [one.row(tokens, one is cache) for one in caches],
        "activations": _activation_row(pool.activations, tokens, layers, batch),
        "needed_bytes": needed,
        "fits": None if memory is None else needed <= memory,
        "longest": [] if memory is None else _longest_rows(pool, rows, caches),
        "measured": open_checkpoint(model).report["measured"] if is_checkpoint(user_path(model)) else [],
    }


def _check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; use at least 1.")


def largest(fits: Callable[[int], bool]) -> int | None:
    """Return the largest number that fits, by bisection: 0 where 1 does not, None where there is no limit."""
    if not fits(1):
        return 0
    if fits(_UNBOUNDED):
        return None
    low, high = 1, _UNBOUNDED
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _open_streamed(source: Source, layers: tuple[CachedLayer, ...]) -> StreamedModel | str:
    """Return the model without weights, or the reason why its weights cannot be quantized."""
    try:
        streamed = StreamedModel(source)
    except SourceError as error:
        return str(error)
    check_key_widths(layers, streamed.model, source.name)
    return streamed


def _activations(source: Source, streamed: StreamedModel | str, batch: int) -> Activations:
    """Return the activations of one block; of a Llama block where the model is not supported."""
    config = source.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    if isinstance(streamed, str):
        widths = 4 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    else:
        running = getattr(config, "num_experts_per_tok", None) or 1
        linears = [linear for linear in streamed.linears(0) if _expert_number(linear) < running]
        names = [f"{streamed.block_name(0)}.{linear}.weight" for linear in linears]
        widths = sum(streamed.shape(name)[1 if streamed.adapter.transposed else 0] for name in names)
    return Activations(2 * batch * (2 * hidden + widths), 4 * batch * config.vocab_size)


def _expert_number(linear: str) -> int:
    """Return the number of the expert that a linear layer belongs to; 0 for all other layers, which always run."""
    expert = expert_of(linear)
    return expert[1] if expert else 0


def _activation_row(
    activations: Activations, tokens: int, layers: tuple[CachedLayer, ...], batch: int
) -> dict[str, int]:
    return {
        "chunk": PROMPT_CHUNK,
        "prompt_bytes": activations.of(min(tokens, PROMPT_CHUNK)),
        "decode_bytes": activations.of(1),
        "prompt_at_once_bytes": activations.of(tokens),
        "float_layer_bytes": max(4 * batch * layer.num_elements(tokens) for layer in layers),
    }


def _longest_rows(
    devices: Devices, weights: list[dict[str, Any]], caches: list[CacheStorage]
) -> list[dict[str, Any]]:
    return [
        {
            "weights": row["name"],
            "method": cache.name,
            "bits": cache.bits,
            "tokens": devices.longest(row["size_bytes"], cache),
        }
        for row in weights
        for cache in caches
    ]
