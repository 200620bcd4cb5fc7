"""Caches of one sequence that the compiled step appends to, and that transformers reads as layers."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

MIN_CAPACITY = 256  # tokens


class StepCache(Protocol):
    """The interface of the step to a cache of one sequence, in floats or packed.

    Attributes:
        length: Number of tokens in the cache.
        kind: Caches of one kind use the same code of the step.
    """

    length: int
    kind: str

    def make_room(self) -> None:
        """Make room for one token."""

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a compiled model's `advance` (csrc/bind_step.cpp)."""

    def advance(self) -> None:
        """Increase the length by the token that the step has appended."""


class PackedStepCache(StepCache, Protocol):
    """The object that a packed cache returns from its method `decode_step_cache`."""

    def unsupported_reason(self, blocks: int, heads: int, dim: int) -> str | None:
        """Return None if the step supports the cache in its present state, or a phrase with the reason.

        Args:
            blocks: Blocks of the model.
            heads: Heads of keys and values.
            dim: Numbers of a head.
        """


class KVBuffer:
    """Memory for the keys and values of some blocks: `numbers`, fp32 (blocks, 2, heads, capacity, dim).

    Attributes:
        window: Tokens that the blocks read, the present one included; 0 for all.
        first: Position of the first token in it; earlier ones have left the window.
    """

    def __init__(self, blocks: int, heads: int, dim: int, tokens: int, window: int = 0, first: int = 0) -> None:
        self.numbers = _memory(blocks, heads, tokens - first, dim)
        self.window, self.first = window, first
        self._emptied: KVBuffer | None = None

    @property
    def capacity(self) -> int:
        """The number of tokens that fit."""
        return self.numbers.shape[3]

    def visible_from(self, length: int) -> int:
        """Return the position of the first token that the token at position `length` reads."""
        return max(0, length - self.window + 1) if self.window else 0

    def make_room(self, tokens: int, length: int) -> None:
        """Make room for tokens; memory at least doubles when it grows, and tokens outside the window are dropped.

        Args:
            tokens: Number of tokens to make room for, from position 0 on.
            length: Number of tokens so far.
        """
        if tokens - self.first <= self.capacity or not len(self.numbers):
            return
        first = max(self.first, self.visible_from(length))
        blocks, _, heads, _, dim = self.numbers.shape
        # with a window, room for as many tokens again before the next move
        needed = (2 if self.window else 1) * (tokens - first)
        grown, kept = _memory(blocks, heads, needed, dim), self.numbers[..., first - self.first :, :]
        count = min(kept.shape[3], grown.shape[3])  # of a block that is ahead, tokens after `length`
        grown[..., :count, :] = kept[..., :count, :]
        self.numbers, self.first = grown, first

    def emptied(self) -> KVBuffer:
        """Return the empty buffer that takes this one's place, one for all of its layers."""
        if self._emptied is None:
            blocks, _, heads, _, dim = self.numbers.shape
            self._emptied = KVBuffer(blocks, heads, dim, 0, self.window)
        return self._emptied


@cache
def _empty_buffer(heads: int, dim: int) -> KVBuffer:
    """Return a buffer of no blocks."""
    return KVBuffer(0, heads, dim, 0)


def _memory(blocks: int, heads: int, tokens: int, dim: int) -> Tensor:
    capacity = max(MIN_CAPACITY, 1 << max(0, tokens - 1).bit_length())
    with torch.inference_mode(False):  # a tensor made in that mode can be written to in no other
        return torch.empty(blocks, 2, heads, capacity, dim)


class KVBufferLayer(DynamicLayer):
    """One block's part of a KVBuffer, as a layer of a transformers cache.

    Assigning other tensors to `keys` and `values` (beam search, several sequences) detaches the layer from the
    buffer; from then on it is an ordinary layer. `keys` and `values` may be views: clone what must outlast a
    `crop`, because later tokens overwrite removed ones.
    """

    def __init__(self, past: KVBuffer, index: int, length: int, dtype: torch.dtype) -> None:
        self.past, self.index, self.length, self.dtype = past, index, length, dtype
        self.device, self.is_initialized = torch.device("cpu"), True
        self._replaced: list[Tensor | None] = [None, None]

    @property
    def is_attached(self) -> bool:
        """True while its keys and values are the buffer's."""
        return self._replaced[0] is None and self._replaced[1] is None

    def _part(self, which: int) -> Tensor:
        replaced = self._replaced[which]
        if replaced is not None:
            return replaced
        return self._from(self.past.visible_from(self.length), which)

    def _from(self, position: int, which: int) -> Tensor:
        tokens = slice(position - self.past.first, self.length - self.past.first)
        return self.past.numbers[self.index, which][None, :, tokens].to(self.dtype)

    @property
    def keys(self) -> Tensor:
        """(sequences, heads, tokens, dim)."""
        return self._part(0)

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._replaced[0] = keys

    @property
    def values(self) -> Tensor:
        """(sequences, heads, tokens, dim)."""
        return self._part(1)

    @values.setter
    def values(self, values: Tensor) -> None:
        self._replaced[1] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens.

        Args:
            key_states: Keys (sequences, heads, tokens, dim).
            value_states: Values (sequences, heads, tokens, dim).
            *args: Ignored, as in DynamicLayer.
            **kwargs: Ignored, as in DynamicLayer.

        Returns:
            All keys and all values.
        """
        if not self.is_attached or key_states.shape[0] != 1 or key_states.requires_grad:
            if self.is_attached and not self.length:  # no earlier tokens of another shape
                self.lazy_initialization(key_states, value_states)
            elif self.is_attached:
                self.keys, self.values = self.keys, self.values
            return super().update(key_states, value_states, *args, **kwargs)
        seen, end = self.past.visible_from(self.length), self.length + key_states.shape[-2]
        # blocks are updated one after the other: all of them have at least as much as this one
        self.past.make_room(end, self.length)
        tokens = slice(self.length - self.past.first, end - self.past.first)
        for which, states in enumerate((key_states, value_states)):
            self.past.numbers[self.index, which, :, tokens] = states[0]
        self.length = end
        return self._from(seen, 0), self._from(seen, 1)

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.length if self.is_attached else super().get_seq_length()

    def reset(self) -> None:
        """Remove all tokens."""
        self.length, self._replaced = 0, [None, None]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; `tokens_to_remove` is negative, as in transformers."""
        if tokens_to_remove > 0 or not self.is_attached:
            super().crop(tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)


class WindowBufferLayer(KVBufferLayer, DynamicSlidingWindowLayer):
    """A KVBufferLayer of a block with a sliding window; `keys` and `values` are the tokens still visible."""

    def __init__(self, past: KVBuffer, index: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(past, index, length, dtype)
        self.sliding_window, self.record_past = past.window, False
        self._sliding_window_tensor = torch.tensor(past.window, dtype=torch.long)

    @property
    def cumulative_length(self) -> int:
        """The number of tokens, visible or not."""
        return self.length

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self.length = length

    def activate_past_recording(self) -> None:
        """Detach from the buffer, which keeps no tokens outside of the window."""
        if self.is_attached:
            self.keys, self.values = self.keys, self.values
        self.record_past = True

    def get_seq_length(self) -> int:
        """Return the number of tokens, visible or not."""
        return self.length

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.past = self.past.emptied()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; raises RuntimeError once tokens have left the window, as in transformers."""
        if self.length >= self.sliding_window or not self.is_attached:
            DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


class FloatStepCache:
    """The buffers of a cache and its layers, each with `length` tokens.

    Args:
        every: Buffer of the blocks that read all tokens.
        recent: Buffer of the blocks with a window.
        layers: Of the cache.
        length: Number of tokens.
    """

    kind = "floats"

    def __init__(self, every: KVBuffer, recent: KVBuffer, layers: list[Any], length: int) -> None:
        self.every, self.recent, self.layers, self.length = every, recent, layers, length

    def make_room(self, tokens: int = 1) -> None:
        """Make room for tokens."""
        for buffer in (self.every, self.recent):
            buffer.make_room(self.length + tokens, self.length)

    def arguments(self) -> tuple[Tensor, int, Tensor, int]:
        """Return keys and values, and their number, without and with a window."""
        return self.every.numbers, self.length, self.recent.numbers, self.length - self.recent.first

    def advance(self, tokens: int = 1) -> None:
        """Increase the length by the tokens that the step has appended."""
        self.length += tokens
        for layer in self.layers:
            layer.length = self.length

    def finish(self) -> None:
        """Do nothing: tokens are in their place."""


def packed_step_cache(cache: Any) -> PackedStepCache | None:
    """Return the step's interface to a packed cache; None for other caches."""
    offered: Any = getattr(cache, "decode_step_cache", None)
    packed: PackedStepCache | None = None if offered is None else offered()
    return packed


def step_cache_of(cache: Any, windows: tuple[int, ...], heads: int, dim: int) -> StepCache | None:
    """Return the step's interface to a cache; the layers of an ordinary one are first moved into buffers.

    Args:
        cache: The cache, of one sequence.
        windows: Tokens that each block reads; 0 for all.
        heads: Heads of keys and values.
        dim: Numbers of a head.

    Returns:
        None if the cache is of another kind, or empty.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None or len(layers) != len(windows) or cache.offloading:
        return None
    packed = packed_step_cache(cache)
    if packed is not None:
        return packed if packed.unsupported_reason(len(windows), heads, dim) is None else None
    if type(layers[0]) in (KVBufferLayer, WindowBufferLayer):
        found = _buffered(layers, windows)
        return found if found is not None and found.length else None
    if not all(_is_plain(layer, window, heads, dim) for layer, window in zip(layers, windows)):
        return None
    length = layers[0].get_seq_length()
    if not length or any(layer.get_seq_length() != length for layer in layers):
        return None
    return _moved(layers, windows, heads, dim)


def float_prompt_cache(
    cache: Any, windows: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype
) -> FloatStepCache | None:
    """Return the interface to an ordinary cache, as `step_cache_of` does, and to an empty one.

    Args:
        cache: The cache, empty or of one sequence.
        windows: Tokens that each block reads; 0 for all.
        heads: Heads of keys and values.
        dim: Numbers of a head.
        dtype: Of the model's keys and values.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None or len(layers) != len(windows) or cache.offloading:
        return None
    if all(type(layer) in _KINDS for layer in layers):
        return _buffered(layers, windows)
    if any(layer.is_initialized for layer in layers):
        found = step_cache_of(cache, windows, heads, dim)
        return found if isinstance(found, FloatStepCache) else None
    if not all(_is_empty(layer, window) for layer, window in zip(layers, windows)):
        return None
    return _moved(layers, windows, heads, dim, dtype)


def _buffered(layers: list[Any], windows: tuple[int, ...]) -> FloatStepCache | None:
    """Return the interface to layers that are in buffers, None where one has left them."""
    buffers: list[KVBuffer | None] = [None, None]
    length = layers[0].length
    for layer, window in zip(layers, windows):
        side = 1 if window else 0
        if buffers[side] is None and type(layer) is _KINDS[side]:
            buffers[side] = layer.past
        if (
            type(layer) is not _KINDS[side]
            or layer.past is not buffers[side]
            or layer.length != length
            or not layer.is_attached
        ):
            return None
    every, recent = (buffer or _empty_buffer(*layers[0].past.numbers.shape[2::2]) for buffer in buffers)
    return FloatStepCache(every, recent, layers, length)


def _moved(
    layers: list[Any], windows: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype | None = None
) -> FloatStepCache:
    """Move the layers of a cache into buffers; `dtype` is that of empty ones."""
    length, window = layers[0].get_seq_length(), max(windows)
    count = sum(map(bool, windows))
    every = KVBuffer(len(windows) - count, heads, dim, length + 1)
    recent = KVBuffer(count, heads, dim, length + 1, window, max(0, length - window + 1) if window else 0)
    buffers = (every, recent)
    used = [0, 0]
    for place, (layer, window) in enumerate(zip(layers, windows)):
        side = 1 if window else 0
        buffer, index = buffers[side], used[side]
        used[side] += 1
        if length:
            tokens = slice(layer.keys.shape[2])
            for which, states in enumerate((layer.keys, layer.values)):
                buffer.numbers[index, which, :, tokens] = states[0]
        layers[place] = _KINDS[side](buffer, index, length, layer.keys.dtype if dtype is None else dtype)
    return FloatStepCache(every, recent, layers, length)


_KINDS = (KVBufferLayer, WindowBufferLayer)  # without and with a window


def _is_empty(layer: Any, window: int) -> bool:
    if type(layer) is not (DynamicSlidingWindowLayer if window else DynamicLayer) or layer.is_initialized:
        return False
    sliding: Any = layer
    return not window or (sliding.sliding_window == window and not sliding.record_past)


def _is_plain(layer: Any, window: int, heads: int, dim: int) -> bool:
    if type(layer) is not (DynamicSlidingWindowLayer if window else DynamicLayer) or not layer.is_initialized:
        return False
    sliding: Any = layer
    if window and (sliding.sliding_window != window or sliding.record_past):
        return False
    keys: Any = layer.keys
    if window and keys.dim() == 4 and keys.shape[2] != min(sliding.cumulative_length, window - 1):
        return False
    return keys.dim() == 4 and keys.shape[:2] == (1, heads) and keys.shape[3] == dim and keys.device.type == "cpu"
