"""Keys and values of one sequence where the compiled step appends to them, as layers that transformers reads."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

MIN_CAPACITY = 256  # tokens


class StepCache(Protocol):
    """What the step needs of a cache of one sequence, of floats or packed.

    length: tokens that are there.  kind: caches of one kind are served alike.
    """

    length: int
    kind: str

    def make_room(self) -> None:
        """Room for a token."""

    def arguments(self) -> tuple[Any, ...]:
        """The past as a compiled model's `advance` takes it (csrc/bind_step.cpp)."""

    def advance(self) -> None:
        """Count the token that the step has appended."""


class PackedStepCache(StepCache, Protocol):
    """What a packed cache offers by its method `decode_step_cache`."""

    def unsupported_reason(self, blocks: int, heads: int, dim: int) -> str | None:
        """None where the step of a model of this shape takes the cache as it is now, or a phrase on why not."""


class KVBuffer:
    """Memory for the keys and values of all blocks: `numbers`, fp32 (blocks, 2, heads, capacity, dim)."""

    def __init__(self, blocks: int, heads: int, dim: int, tokens: int) -> None:
        self.numbers = _memory(blocks, heads, tokens, dim)

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return self.numbers.shape[3]

    def make_room(self, tokens: int, length: int) -> None:
        """Room for `tokens`, of which `length` are there; memory doubles when it must grow."""
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
    """One block's part of a KVBuffer, as transformers' caches hold it.

    Assigning other tensors to `keys` and `values` (beam search, several sequences) detaches the layer from the
    buffer; from then on it is an ordinary layer. `keys` and `values` may be views: clone what must outlast a
    `crop`, because later tokens overwrite removed ones.
    """

    def __init__(self, past: KVBuffer, index: int, length: int, dtype: torch.dtype) -> None:
        self.past, self.index, self.length, self.dtype = past, index, length, dtype
        self.device, self.is_initialized = torch.device("cpu"), True
        self._others: list[Tensor | None] = [None, None]

    @property
    def is_ours(self) -> bool:
        """Whether its keys and values are the KVBuffer's."""
        return self._others[0] is None and self._others[1] is None

    def _part(self, which: int) -> Tensor:
        other = self._others[which]
        if other is not None:
            return other
        return self.past.numbers[self.index, which][None, :, : self.length].to(self.dtype)

    @property
    def keys(self) -> Tensor:
        """(sequences, heads, tokens, dim)."""
        return self._part(0)

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._others[0] = keys

    @property
    def values(self) -> Tensor:
        """(sequences, heads, tokens, dim)."""
        return self._part(1)

    @values.setter
    def values(self, values: Tensor) -> None:
        self._others[1] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (sequences, heads, tokens, dim); returns all there are."""
        if not self.is_ours or key_states.shape[0] != 1 or key_states.requires_grad:
            if self.is_ours and not self.length:  # nothing is there that must be of the same shape
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
        """Tokens that are there."""
        return self.length if self.is_ours else super().get_seq_length()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length, self._others = 0, [None, None]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative, as transformers has it."""
        if tokens_to_remove > 0 or not self.is_ours:
            super().crop(tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)


class FloatStepCache:
    """A KVBuffer and its layers, all of which hold `length` tokens."""

    kind = "floats"

    def __init__(self, past: KVBuffer, layers: list[Any], length: int) -> None:
        self.past, self.layers, self.length = past, layers, length

    def make_room(self) -> None:
        """Room for a token."""
        self.past.make_room(self.length + 1, self.length)

    def arguments(self) -> tuple[Tensor, int]:
        """Keys and values, and how many there are."""
        return self.past.numbers, self.length

    def advance(self) -> None:
        """Count the token that the step has appended."""
        for layer in self.layers:
            layer.length = self.length + 1


def packed_step_cache(cache: Any) -> PackedStepCache | None:
    """What a packed cache offers the step; None for caches of another kind."""
    offered: Any = getattr(cache, "decode_step_cache", None)
    packed: PackedStepCache | None = None if offered is None else offered()
    return packed


def step_cache_of(cache: Any, blocks: int, heads: int, dim: int) -> StepCache | None:
    """A cache as the step takes it; an ordinary one of one sequence is made into a KVBuffer first.

    None where the cache is of another kind, or holds nothing yet.
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
                or not layer.is_ours
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
