"""Bytes of the keys and values, by every method and at every number of bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bitmill.errors import RecipeError
from bitmill.kv import KV_METHODS, KVMethod
from bitmill.kv.config import KVConfig
from bitmill.kv.scheme import Scheme
from bitmill.kv.size import FLOAT_BITS, CacheSize, check_heads, layer_cache_size
from bitmill.models.kv_shapes import CachedLayer

BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class CacheStorage:
    """Storage of keys and values by a method, or in fp16 without one."""

    method: KVMethod | None
    layers: tuple[CachedLayer, ...]
    batch: int

    @property
    def name(self) -> str:
        """The method's name, or float16."""
        return self.method.name if self.method else "float16"

    @property
    def bits(self) -> int:
        """Bits of a code, or of a float."""
        return self.method.bits if self.method else FLOAT_BITS

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method, except bits, that differ from their defaults."""
        fields = KV_METHODS.options(self.name) if self.method else {}
        given = {name: getattr(self.method, name) for name in fields if name != "bits"}
        return {name: value for name, value in given.items() if value != fields[name].default}

    def size(self, tokens: int) -> CacheSize:
        """Return the bytes after `tokens` tokens per sequence.

        Raises:
            RecipeError: the method does not support these heads.
        """
        sizes = (
            layer_cache_size(self.method, layer, count, tokens, self.batch, scheme)
            for (layer, scheme), count in self._alike.items()
        )
        return sum(sizes, CacheSize())

    @cached_property
    def _alike(self) -> dict[tuple[CachedLayer, Scheme | None], int]:
        """Number of layers by shape and storage scheme: sizes are asked for at thousands of contexts."""
        schemes = (self.method.layer_scheme(n) if self.method else None for n in range(len(self.layers)))
        return Counter(zip(self.layers, schemes))

    def row(self, tokens: int, chosen: bool) -> dict[str, Any]:
        """Return the sizes as plain data.

        Args:
            tokens: per sequence.
            chosen: marks the requested storage.
        """
        size = self.size(tokens)
        numbers = self.batch * sum(layer.num_elements(tokens) for layer in self.layers)
        return {
            "method": self.name,
            "bits": self.bits,
            "options": self.options,
            "bits_per_element": 8 * size.allocated / numbers,
            "size_bytes": size.total,
            "parts": vars(size),
            "chosen": chosen,
        }


def cache_storages(
    layers: tuple[CachedLayer, ...], batch: int, config: KVConfig | None
) -> tuple[list[CacheStorage], CacheStorage]:
    """Return fp16 and every method at every number of bits, and the requested one of them.

    Args:
        layers: layers that cache keys and values.
        batch: number of sequences.
        config: requested method, whose options apply to its other bits too; None for fp16.

    Raises:
        RecipeError: the requested method is unknown or does not support these heads.
    """
    requested = None if config is None else config.method()
    if requested is not None:
        _check_layers(requested, layers)
    storages = [CacheStorage(None, layers, batch)]
    for name in KV_METHODS.names():
        base = config if config is not None and config.name == name else KVConfig(name)
        for bits in BITS:
            try:
                method = base.with_bits(bits).method()
                _check_layers(method, layers)
            except RecipeError:  # does not support these bits or heads
                continue
            storages.append(CacheStorage(method, layers, batch))
    return storages, next(storage for storage in storages if storage.method == requested)


def _check_layers(method: KVMethod, layers: tuple[CachedLayer, ...]) -> None:
    """Raise RecipeError where a method does not support the heads of a layer."""
    for number, layer in enumerate(layers):
        check_heads(method.layer_scheme(number), layer.heads, layer.dim)
