"""A packed cache of one sequence as the compiled step reads and extends it (runtime.decode.step_cache: Packed)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from bitmill.kv.batched import BatchPacker
from bitmill.kv.layer import QuantizedLayer
from bitmill.runtime.native import unsupported_reason

_length = attrgetter("length")
_memory = attrgetter("version", "store.pages")


class DecodeStepCache:
    """What a step of the whole model needs to know of a cache's layers, kept from token to token.

    length: tokens that are there.  kind: which of the caches that the step serves alike it is.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.length, self.kind = layers, 0, "packed"
        self._shape: tuple[int, int, int] | None = None
        self._seen: list[tuple[int, int]] = []
        self._blocks: list[Any] = []
        self._stores: list[Any] = []
        self._together: BatchPacker | None = None
        self._why_not: str | None = None

    def unsupported_reason(self, blocks: int, heads: int, dim: int) -> str | None:
        """Look at the layers again: None where a step of a model of this shape takes them, or why none does."""
        layers = self.layers
        if not all(type(layer) is QuantizedLayer for layer in layers):
            return "the cache holds states of another kind"
        if not all(layer.is_initialized for layer in layers):
            return "the packed cache is empty"
        lengths, memory = list(map(_length, layers)), list(map(_memory, layers))
        if lengths.count(lengths[0]) != len(lengths):
            return "the layers of the packed cache hold different numbers of tokens"
        self.length = lengths[0]
        if memory != self._seen or self._shape != (blocks, heads, dim):
            self._shape, self._seen = (blocks, heads, dim), memory
            self._why_not = self._examined()
        if self._why_not is None and not layers[0].is_direct:
            return "the model's attention wants floats"
        return self._why_not

    def _examined(self) -> str | None:
        """The same, of what changes seldom; what the step reads is told of where it is."""
        blocks, *shape = self._shape or (0, 0, 0)
        first: QuantizedLayer = self.layers[0]
        if (missing := unsupported_reason("KvBlock")) is not None:
            return _phrase(missing)
        if len(self.layers) != blocks or any([layer.heads, layer.dim] != shape for layer in self.layers):
            return "the packed cache is of a model of another shape"
        for layer in self.layers:
            if layer.pages.rows != 1 or layer.is_padded:
                return "the packed cache holds several sequences, or padding"
            if layer.window is not None or layer.pages.first:
                return "tokens slide out of sight of the packed cache"
            if layer.pages.pages != first.pages.pages or layer.scheme != first.scheme:
                return "the layers of the packed cache differ"
            if layer.reader.unsupported_reason is not None:
                return _phrase(layer.reader.unsupported_reason)
        self.kind = f"packed by {first.scheme}"
        self._blocks = [layer.reader.block() for layer in self.layers]
        if [layer.pages for layer in self.layers] != self._stores:
            self._stores, self._together = [layer.pages for layer in self.layers], None
        return None

    def make_room(self) -> None:
        """Room for a token: a page that is full is packed."""
        first: QuantizedLayer = self.layers[0]
        if first.num_unpacked < first.scheme.tail:
            return
        if self._together is None:
            self._together = BatchPacker(self.layers)
        if self._together.is_possible:
            self._together.pack_full_page()
        else:
            for layer in self.layers:
                layer.pack_full_page()
        self._seen = list(map(_memory, self.layers))
        self._blocks = [layer.reader.block() for layer in self.layers]

    def arguments(self) -> tuple[list[Any], int, int, int]:
        """What a compiled model's `advance` takes as the past."""
        first: QuantizedLayer = self.layers[0]
        packed = first.pages.end
        return self._blocks, packed, first.scheme.sink, self.length - packed

    def advance(self) -> None:
        """The step has written a token where the next one waits."""
        for layer in self.layers:
            layer.length += 1


def _phrase(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
