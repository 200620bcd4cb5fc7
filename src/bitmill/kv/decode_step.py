"""A packed cache of one sequence, as the compiled decode step reads and extends it (bitmill.runtime.decode)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from bitmill.kv.batched import BatchPacker
from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.layer import QuantizedLayer
from bitmill.native import unsupported_reason

MAX_FLOAT_BYTES = 1 << 28  # of keys and values in floats while a prompt is read

_length = attrgetter("buffer.length")
_memory_state = attrgetter("buffer.version", "buffer.store.num_pages")


class DecodeStepCache:
    """State of a cache's layers that the decode step of a model needs, kept from token to token.

    Args:
        layers: of the cache.

    Attributes:
        length: tokens in the cache.
        kind: caches of one kind are served alike by the step.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.length, self.kind = layers, 0, "packed"
        self._shape: tuple[int, int, int] | None = None
        self._memory: list[tuple[int, int]] = []
        self._blocks: list[Any] = []
        self._stores: list[Any] = []
        self._packer: BatchPacker | None = None
        self._reason: str | None = None

    def unsupported_reason(self, blocks: int, heads: int, dim: int) -> str | None:
        """Check the layers as they are now.

        Args:
            blocks: decoder blocks of the model.
            heads: key/value heads.
            dim: head dimension.

        Returns:
            None if the step of such a model takes the cache, else a phrase on why not.
        """
        layers = self.layers
        if not all(type(layer) is QuantizedLayer for layer in layers):
            return "the cache holds states of another kind"
        if not all(layer.is_initialized for layer in layers):
            return "the packed cache is empty"
        lengths, memory = list(map(_length, layers)), list(map(_memory_state, layers))
        if lengths.count(lengths[0]) != len(lengths):
            return "the layers of the packed cache hold different numbers of tokens"
        self.length = lengths[0]
        if memory != self._memory or self._shape != (blocks, heads, dim):
            self._shape, self._memory = (blocks, heads, dim), memory
            self._reason = self._check_memory(blocks, [heads, dim])
        if self._reason is None and not layers[0].is_direct:
            return "the model's attention needs floats"
        return self._reason

    def _check_memory(self, blocks: int, shape: list[int]) -> str | None:
        """Check the properties that change only with the layers' memory, and collect the arguments of the step."""
        buffers = [layer.buffer for layer in self.layers]
        first = buffers[0]
        if (missing := unsupported_reason("KvBlock")) is not None:
            return _as_phrase(missing)
        if len(buffers) != blocks or any([buffer.heads, buffer.dim] != shape for buffer in buffers):
            return "the packed cache is of a model of another shape"
        for layer, buffer in zip(self.layers, buffers):
            if buffer.pages.rows != 1 or buffer.is_padded:
                return "the packed cache holds several sequences, or padding"
            if layer.window is not None or buffer.pages.first:
                return "tokens leave the sliding window of the packed cache"
            if buffer.pages.num_pages != first.pages.num_pages or _waiting(buffer) != _waiting(first):
                return "the layers of the packed cache differ"
            if layer.kernel_args.unsupported_reason is not None:
                return _as_phrase(layer.kernel_args.unsupported_reason)
        schemes = list(dict.fromkeys(buffer.scheme for buffer in buffers))
        self.kind = f"packed by {schemes}"
        self._blocks = [layer.kernel_args.block() for layer in self.layers]
        stores = [buffer.pages for buffer in buffers]
        if stores != self._stores:
            self._stores, self._packer = stores, None
        return None

    def prompt(self, blocks: int, heads: int, dim: int, tokens: int, dtype: torch.dtype) -> PackedPrompt | None:
        """Return the cache as a compiled prompt extends it; None if transformers must read the prompt.

        Args:
            blocks: decoder blocks of the model.
            heads: key/value heads.
            dim: head dimension.
            tokens: of the prompt.
            dtype: of the model's keys and values.
        """
        layers = self.layers
        if len(layers) != blocks or not all(type(layer) is QuantizedLayer for layer in layers):
            return None
        lengths = set(map(_length, layers))
        if len(lengths) > 1 or any(layer.window is not None for layer in layers):
            return None
        if (length := lengths.pop()) and any(not _is_of_one(layer.buffer, heads, dim) for layer in layers):
            return None
        if 8 * blocks * heads * (length + tokens) * dim > MAX_FLOAT_BYTES:
            return None
        return PackedPrompt(layers, heads, dim, tokens, dtype)

    def make_room(self) -> None:
        """Make room for a token: pack the page that is full, if one is."""
        if not self.layers[0].buffer.is_full:
            return
        buffers = [layer.buffer for layer in self.layers]
        alike = all(buffer.scheme == buffers[0].scheme for buffer in buffers)
        if self._packer is None and alike:
            self._packer = BatchPacker(buffers)
        if self._packer is not None and self._packer.can_pack:
            self._packer.pack_full_pages()
        else:
            for buffer in buffers:
                buffer.pack_full_page()
        self._memory = list(map(_memory_state, self.layers))
        self._blocks = [layer.kernel_args.block() for layer in self.layers]

    def arguments(self) -> tuple[list[Any], int, int, int]:
        """Return the arguments of a compiled model's `advance`: blocks, packed tokens, sinks, unpacked tokens."""
        first = self.layers[0].buffer
        packed = first.pages.end
        return self._blocks, packed, first.scheme.sink, self.length - packed

    def advance(self) -> None:
        """Count the token that the step has written into the fp16 buffers."""
        for layer in self.layers:
            layer.buffer.length += 1


class PackedPrompt:
    """The tokens of a packed cache in floats, to which a prompt is appended before it is packed.

    Args:
        layers: of the cache.
        heads: key/value heads.
        dim: head dimension.
        tokens: of the prompt.
        dtype: of the model's keys and values.

    Attributes:
        length: tokens in the cache.
    """

    def __init__(self, layers: list[Any], heads: int, dim: int, tokens: int, dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.first = self.length = layers[0].length
        self._numbers = torch.empty(len(layers), 2, heads, self.length + tokens, dim)
        self._none = torch.empty(0, 2, heads, 1, dim)  # of blocks with a window
        for layer, numbers in zip(layers, self._numbers) if self.length else ():
            layer.buffer.pack_full_page()
            for states, part in zip(layer.decode(0), numbers):
                part[:, : self.length] = states[0]

    def make_room(self, tokens: int) -> None:
        """Do nothing: there is room for the whole prompt."""

    def arguments(self) -> tuple[Tensor, int, Tensor, int]:
        """Return keys and values, and their number, without and with a window."""
        return self._numbers, self.length, self._none, 0

    def advance(self, tokens: int) -> None:
        """Increase the length by the tokens that the compiled model has appended."""
        self.length += tokens

    def finish(self) -> None:
        """Append the prompt to the packed cache."""
        for layer, numbers in zip(self.layers, self._numbers[..., self.first :, :].to(self.dtype)):
            layer.append(numbers[:1], numbers[1:])


def _is_of_one(buffer: TokenBuffer, heads: int, dim: int) -> bool:
    """Return True if a buffer holds one sequence without padding, of heads of that size."""
    return buffer.pages.rows == 1 and not buffer.is_padded and (buffer.heads, buffer.dim) == (heads, dim)


def _waiting(buffer: TokenBuffer) -> tuple[int, int]:
    """Return the tokens that stay in fp16: attention sinks, and recent ones."""
    return buffer.scheme.sink, buffer.scheme.residual


def _as_phrase(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
