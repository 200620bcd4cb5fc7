"""Caches of one sequence that the compiled step appends to, and that transformers reads as layers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

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
    """Memory for the keys and values of all blocks: `numbers`, fp32 (blocks, 2, heads, capacity, dim)."""

    def __init__(self, blocks: int, heads: int, dim: int, tokens: int) -> None:
        self.numbers = _memory(blocks, heads, tokens, dim)

    @property
    def capacity(self) -> int:
        """The number of tokens that fit."""
        return self.numbers.shape[3]

    def make_room(self, tokens: int, length: int) -> None:
        """Make room for tokens; memory at least doubles when it grows.

        Args:
            tokens: Number of tokens to make room for.
            length: Number of tokens in the buffer.
        """
        if tokens <= self.capacity:
            return
        blocks, _, heads, _, dim = self.numbers.shape
        grown = _memory(blocks, heads, tokens, dim)
        grown[..., :length, :] = self.numbers[..., :length, :]
        self.numbers = grown


def _memory(blocks: int, heads: int, tokens: int, dim: int) -> Tensor:
    capacity = max(MIN_CAPACITY, 1 << (tokens - 1).bit_length())
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
        return self.past.numbers[self.index, which][None, :, : self.length].to(self.dtype)

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
            return super().update(key_states, value_states, *args, **kwargs)
        end = self.length + key_states.shape[-2]
        # blocks are updated one after the other: all of them have at least as much as this one
        self.past.make_room(end, self.past.capacity)
        for which, states in enumerate((key_states, value_states)):
            self.past.numbers[self.index, which, :, self.length : end] = states[0]
        self.length = end
        return self.keys, self.values

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


class FloatStepCache:
    """A KVBuffer and its layers, each with `length` tokens."""

    kind = "floats"

    def __init__(self, past: KVBuffer, layers: list[Any], length: int) -> None:
        self.past, self.layers, self.length = past, layers, length

    def make_room(self) -> None:
        """Make room for one token."""
        self.past.make_room(self.length + 1, self.length)

    def arguments(self) -> tuple[Tensor, int]:
        """Return keys and values, and their number."""
        return self.past.numbers, self.length

    def advance(self) -> None:
        """Increase the length by the token that the step has appended."""
        for layer in self.layers:
            layer.length = self.length + 1


def packed_step_cache(cache: Any) -> PackedStepCache | None:
    """Return the step's interface to a packed cache; None for other caches."""
    offered: Any = getattr(cache, "decode_step_cache", None)
    packed: PackedStepCache | None = None if offered is None else offered()
    return packed


def step_cache_of(cache: Any, blocks: int, heads: int, dim: int) -> StepCache | None:
    """Return the step's interface to a cache; the layers of an ordinary one are first moved into a KVBuffer.

    Args:
        cache: The cache, of one sequence.
        blocks: Blocks of the model.
        heads: Heads of keys and values.
        dim: Numbers of a head.

    Returns:
        None if the cache is of another kind, or empty.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None or len(layers) != blocks or cache.offloading:
        return None
    packed = packed_step_cache(cache)
    if packed is not None:
        return packed if packed.unsupported_reason(blocks, heads, dim) is None else None
    first = layers[0]
    if type(first) is KVBufferLayer:
        past, length = first.past, first.length
        for layer in layers:
            if (
                type(layer) is not KVBufferLayer
                or layer.past is not past
                or layer.length != length
                or not layer.is_attached
            ):
                return None
        return FloatStepCache(past, layers, length) if length else None
    if not all(_is_plain(layer, heads, dim) for layer in layers):
        return None
    length = first.get_seq_length()
    if not length or any(layer.get_seq_length() != length for layer in layers):
        return None
    past = KVBuffer(blocks, heads, dim, length + 1)
    for index, layer in enumerate(layers):
        past.numbers[index, 0, :, :length], past.numbers[index, 1, :, :length] = layer.keys[0], layer.values[0]
        layers[index] = KVBufferLayer(past, index, length, layer.keys.dtype)
    return FloatStepCache(past, layers, length)


def _is_plain(layer: Any, heads: int, dim: int) -> bool:
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return False
    keys: Any = layer.keys
    return keys.dim() == 4 and keys.shape[:2] == (1, heads) and keys.shape[3] == dim and keys.device.type == "cpu"
