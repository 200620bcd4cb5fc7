"""Bytes of the keys and values, by every method and at every number of bits."""

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
        """Options of the method apart from bits that differ from their defaults."""
        fields = KV_METHODS.options(self.name) if self.method else {}
        given = {name: getattr(self.method, name) for name in fields if name != "bits"}
        return {name: value for name, value in given.items() if value != fields[name].default}

    def size(self, tokens: int) -> CacheSize:
        """Return the bytes after `tokens` tokens per sequence.

        Raises:
            RecipeError: the method does not support these heads.
        """
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
        """Return the sizes at `tokens` tokens per sequence as plain data; `chosen` marks the requested storage."""
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
    layers: tuple[CachedLayer, ...], batch: int, kv: str | None, bits: int | None
) -> tuple[list[CacheStorage], CacheStorage]:
    """Return fp16 and every method at every number of bits, and the requested one of them.

    Args:
        layers: layers that cache keys and values.
        batch: number of sequences.
        kv: requested method, `NAME` or `NAME:key=value,...`, whose options apply to its other bits too;
            None for fp16.
        bits: requested bits; those of `kv`, or its default, when left out.

    Raises:
        RecipeError: the requested method is unknown or does not support these heads.
        UsageError: bits are given without a method.
    """
    if kv is None and bits is not None:
        methods = ", ".join(KV_METHODS.names())
        raise UsageError(f"--kv-bits is {bits} and no method is named; give --kv, one of {methods}.")
    requested = None if kv is None else _parse_method(kv, bits)
    if requested is not None:
        _check_heads(requested, layers)
    storages = [CacheStorage(None, layers, batch)]
    for name in KV_METHODS.names():
        text = kv if kv is not None and requested is not None and name == requested.name else name
        for width in BITS:
            try:
                method = _parse_method(text, width)
                _check_heads(method, layers)
            except RecipeError:  # does not support these bits or heads
                continue
            storages.append(CacheStorage(method, layers, batch))
    return storages, next(storage for storage in storages if storage.method == requested)


def _parse_method(text: str, bits: int | None) -> KVMethod:
    """Return the method of `NAME:key=value,...`; `bits` overrides those in the text."""
    data = part_of(KV_METHODS, text)
    name, own = data.pop(KV_METHODS.noun), data.pop("bits", None)
    return kv_method(name, own if bits is None else bits, **data)


def _check_heads(method: KVMethod, layers: tuple[CachedLayer, ...]) -> None:
    """Raise RecipeError where a method does not support the heads."""
    CacheStorage(method, layers, 1).size(1)
    scheme = method.scheme()
    if scheme.keys.rotated or scheme.values.rotated:
        for dim in {layer.dim for layer in layers}:
            hadamard_rotation(dim)
