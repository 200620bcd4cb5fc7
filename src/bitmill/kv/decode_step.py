"""A packed cache of one sequence, as the compiled decode step reads and extends it (bitmill.runtime.decode)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from bitmill.kv.batched import BatchPacker
from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.layer import QuantizedLayer
from bitmill.native import unsupported_reason

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


def _waiting(buffer: TokenBuffer) -> tuple[int, int]:
    """Return the tokens that stay in fp16: attention sinks, and recent ones."""
    return buffer.scheme.sink, buffer.scheme.residual


def _as_phrase(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
