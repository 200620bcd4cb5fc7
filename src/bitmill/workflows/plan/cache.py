"""Bytes of the keys and values, by every method and at every width."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from bitmill.config.parsing import part_of
from bitmill.errors import RecipeError, UsageError
from bitmill.kv import KV_METHODS, KVMethod
from bitmill.kv.codec import hadamard_rotation
from bitmill.kv.scheme import kv_method
from bitmill.kv.size import CacheSize, cache_size
from bitmill.models.kv_shapes import CachedLayer

BITS = (8, 4, 3, 2)
FLOAT_BITS = 16
_FLOAT_BYTES = FLOAT_BITS // 8


@dataclass(frozen=True)
class Cache:
    """One way to keep keys and values; without a method plain fp16."""

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
        """Options of the method, bits aside, that are not at their defaults."""
        known = KV_METHODS.options(self.name) if self.method else {}
        given = {name: getattr(self.method, name) for name in known if name != "bits"}
        return {name: value for name, value in given.items() if value != known[name].default}

    def size(self, tokens: int) -> CacheSize:
        """Bytes after `tokens` tokens a row. Raises RecipeError where the heads do not suit the method."""
        total = CacheSize()
        for layer, count in Counter(self.layers).items():
            if self.method is None:
                total += CacheSize(floats=_FLOAT_BYTES * count * self.batch * layer.num_elements(tokens))
                continue
            total += cache_size(
                self.method.scheme(),
                layer.heads,
                layer.dim,
                count,
                tokens,
                batch=self.batch,
                window=layer.window,
                weighed=self.method.weighs_errors,
            )
        return total

    def row(self, tokens: int, chosen: bool) -> dict[str, Any]:
        """Plain data."""
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


def caches(
    layers: tuple[CachedLayer, ...], batch: int, kv: str | None, bits: int | None
) -> tuple[list[Cache], Cache]:
    """fp16 and every method at every width it has, and the one that was asked for; fp16 where nothing was.

    kv: `NAME` or `NAME:key=value,...`, whose options its other widths share. Raises RecipeError for methods that
    are unknown or do not suit the heads, UsageError for bits without a method.
    """
    if kv is None and bits is not None:
        known = ", ".join(KV_METHODS.names())
        raise UsageError(f"--kv-bits is {bits} and no method is named; give --kv, one of {known}.")
    plain = Cache(None, layers, batch)
    asked = None if kv is None else _method(kv, bits)
    if asked is not None:
        _check_heads(asked, layers)
    known_caches = [plain]
    for name in KV_METHODS.names():
        spelled = kv if kv is not None and asked is not None and name == asked.name else name
        for width in BITS:
            try:
                method = _method(spelled, width)
                _check_heads(method, layers)
            except RecipeError:  # no such bits, or no such heads
                continue
            known_caches.append(Cache(method, layers, batch))
    return known_caches, next(cache for cache in known_caches if cache.method == asked)


def _method(spelled: str, bits: int | None) -> KVMethod:
    """The method of `NAME:key=value,...`; `bits` overrides what it says."""
    data = part_of(KV_METHODS, spelled)
    name, own = data.pop(KV_METHODS.noun), data.pop("bits", None)
    return kv_method(name, own if bits is None else bits, **data)


def _check_heads(method: KVMethod, layers: tuple[CachedLayer, ...]) -> None:
    """Raises RecipeError where heads do not suit a method."""
    Cache(method, layers, 1).size(1)
    scheme = method.scheme()
    if scheme.keys.rotated or scheme.values.rotated:
        for dim in {layer.dim for layer in layers}:
            hadamard_rotation(dim)
