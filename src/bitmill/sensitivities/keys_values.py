"""Cost of storing the keys and values of a layer in few bits: the relative error of its attention output.

    error(l, K, V) = |attention(q, k^_K, v^_V) - attention(q, k, v)|^2 / |attention(q, k, v)|^2

in one pass of the float model, with all tokens rounded as those of a long context are. To add up with the costs of
weights, errors are multiplied by the divergence of the final logits per error, measured in a few layers.

Source: Li et al. 2025, "KVTuner" (arXiv 2502.04420), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitmill.calibration.streams import BATCH_TOKENS
from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.errors import RecipeError, UsageError
from bitmill.kv.attention import supports_packed_attention
from bitmill.kv.codec import CalibratedParams, TensorCodec
from bitmill.kv.scheme import PAGE, TensorScheme, kv_method
from bitmill.sensitivities.base import LoadedBlock, Run
from bitmill.sensitivities.divergence import Divergences

Pair = tuple[int, int]  # bits of keys, bits of values
PAIRS: tuple[Pair, ...] = ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8))  # the paper's, by rising size
_SCALE_PAIR: Pair = (4, 2)
_SCALE_LAYERS = 4
WINDOWS, TOKENS = 4, 256
TASK = "sensitivity of keys and values"
_NAME, _SDPA = "bitmill-keys-values", "sdpa"

Attend = Callable[[Tensor, Tensor], Tensor]  # keys and values (rows, heads, tokens, dim) -> attention output
Seen = Callable[[int, Tensor, Tensor, Attend], Tensor]  # layer, keys, values -> the output to go on with


def pairs_of(base: str) -> tuple[Pair, ...]:
    """Return the pairs whose bits a KV method has."""

    def has(bits: int) -> bool:
        try:
            kv_method(base, bits)
        except RecipeError:
            return False
        return True

    return tuple(pair for pair in PAIRS if all(map(has, pair)))


@torch.no_grad()
def measure_keys_values(run: Run, base: str, pairs: Sequence[Pair]) -> dict[int, dict[Pair, float]]:
    """Return layer -> pair of bits -> estimated KL divergence in nats per token.

    Args:
        run: the model and the text.
        base: KV method without calibration that stores the layers.
        pairs: bits of keys and of values.

    Raises:
        UsageError: the model's attention cannot be measured.
    """
    streamed, windows = run.streamed, run.windows[:WINDOWS, :TOKENS]
    if not supports_packed_attention(streamed.model):
        raise UsageError(
            f"The attention of {streamed.source.name} is its own, so the error of its keys and values cannot be "
            "measured; give a budget without a context."
        )
    errors = _Errors(base, pairs)
    with _attention(streamed.model, errors.measure):
        run.progress.start(TASK, len(streamed.blocks))
        with streamed.non_block_weights("embedding"):
            states = HiddenStates(streamed, windows.split(max(1, BATCH_TOKENS // windows.shape[1])))
        for index, block in walk_blocks(streamed, run.progress):
            states.advance(block, index)
        run.progress.finish()
    found = errors.relative()
    scale = _nats_per_error(run, base, windows, found)
    return {layer: {pair: scale * error for pair, error in own.items()} for layer, own in found.items()}


def rounded(x: Tensor, scheme: TensorScheme) -> Tensor:
    """Return keys or values as a packed cache without recent tokens in fp16 returns them.

    Args:
        x: (rows, heads, tokens, dim).
        scheme: without calibrated parameters.
    """
    rows, heads, tokens, dim = x.shape
    codec = TensorCodec.from_params(scheme, heads, dim, CalibratedParams(), x.device)
    padded = functional.pad(x.float(), (0, 0, 0, -tokens % PAGE), mode="replicate")  # no range changes
    stored = codec.to_storage_basis(padded).transpose(1, 2).flatten(2)
    decoded = codec.decode(codec.encode(stored))
    back = decoded.reshape(rows, -1, heads, dim).transpose(1, 2)
    return codec.from_storage_basis(back)[:, :, :tokens].to(x.dtype)


class _Errors:
    """Sums of squared errors of attention outputs, by layer and pair, and of the outputs."""

    def __init__(self, base: str, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        schemes = {bits: kv_method(base, bits).scheme() for pair in pairs for bits in pair}
        self._keys = {bits: schemes[bits].keys for bits, _ in pairs}
        self._values = {bits: schemes[bits].values for _, bits in pairs}
        self._sums: dict[int, dict[Pair, float]] = {}
        self._outputs: dict[int, float] = {}

    def measure(self, layer: int, keys: Tensor, values: Tensor, attend: Attend) -> Tensor:
        """Add the errors of one call, and return the exact output."""
        exact = attend(keys, values)
        own = self._sums.setdefault(layer, dict.fromkeys(self._pairs, 0.0))
        rounded_keys = {bits: rounded(keys, scheme) for bits, scheme in self._keys.items()}
        rounded_values = {bits: rounded(values, scheme) for bits, scheme in self._values.items()}
        for pair in self._pairs:
            error = attend(rounded_keys[pair[0]], rounded_values[pair[1]]) - exact
            own[pair] += float(error.square().sum(dtype=torch.float64))
        self._outputs[layer] = self._outputs.get(layer, 0.0) + float(exact.square().sum(dtype=torch.float64))
        return exact

    def relative(self) -> dict[int, dict[Pair, float]]:
        """Return layer -> pair -> relative squared error."""
        return {
            layer: {pair: total / max(self._outputs[layer], 1e-30) for pair, total in own.items()}
            for layer, own in self._sums.items()
        }


def _nats_per_error(run: Run, base: str, windows: Tensor, errors: dict[int, dict[Pair, float]]) -> float:
    """Return the divergence of the final logits per relative error, over a few layers evenly spaced."""
    streamed, known = run.streamed, sorted(errors)
    count = min(_SCALE_LAYERS, len(known))
    chosen = {known[(2 * n + 1) * len(known) // (2 * count)] for n in range(count)}
    keys, values = (kv_method(base, bits).scheme() for bits in _SCALE_PAIR)
    active: list[int] = []

    def round_one(layer: int, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        if layer not in active:
            return attend(k, v)
        return attend(rounded(k, keys.keys), rounded(v, values.values))

    divergence = 0.0
    with _attention(streamed.model, round_one):
        divergences = Divergences(streamed, windows[:1])
        for index, block in walk_blocks(streamed):
            loaded = LoadedBlock(index, block, {})
            if index in chosen:
                active.append(index)
                divergences.add(loaded, {})
                active.clear()
            divergence += sum(divergences.finish(loaded))
    return divergence / max(sum(errors[layer][_nearest(errors[layer])] for layer in chosen), 1e-30)


def _nearest(own: dict[Pair, float]) -> Pair:
    """Return the pair of the scale, or the smallest where it is not measured."""
    return _SCALE_PAIR if _SCALE_PAIR in own else min(own)


_seen: list[Seen] = []  # what the attention of a model inside `_attention` calls


@contextmanager
def _attention(model: Any, seen: Seen) -> Iterator[None]:
    """Call a function in place of the attention of every layer, inside a with-block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    _seen.append(seen)
    try:
        yield
    finally:
        _seen.pop()
        model.set_attn_implementation(before)


def _observed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as sdpa does, through the function of the innermost `_attention`."""
    sdpa: Any = ALL_ATTENTION_FUNCTIONS[_SDPA]

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        output: Tensor = sdpa(module, query, keys, values, attention_mask, **kwargs)[0]
        return output

    return _seen[-1](module.layer_idx, key, value, attend), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _observed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_SDPA])
