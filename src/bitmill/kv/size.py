"""Which layers of a model can be packed, and the bytes of a cache, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bitmill.errors import UsageError
from bitmill.kv.buffer import SLAB
from bitmill.kv.codec import calibrated_shapes, hadamard_rotation
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import attention_modules, rope_to_undo
from bitmill.kv.scheme import PAGE, KVMethod, Scheme, TensorScheme
from bitmill.models.kv_shapes import CachedLayer, kv_heads_and_dim
from bitmill.tasks.base import task_for

FLOAT_BITS = 16
_FP16_BYTES, _FP32_BYTES = 2, 4


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the parts of a cache.

    Attributes:
        codes: codes of keys and values.
        scales: scales and zeros of pages and tokens.
        outliers: values and indices of outliers.
        floats: fp16 numbers: attention sinks and recent tokens, or all tokens of an ordinary cache.
        tables: calibrated parameters and levels in fp32, independent of the tokens.
    """

    codes: int = 0
    scales: int = 0
    outliers: int = 0
    floats: int = 0
    tables: int = 0

    @property
    def allocated(self) -> int:
        """Return the bytes that `QuantizedCache.allocated_bytes` counts: all but the tables."""
        return self.total - self.tables

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: CacheSize) -> CacheSize:
        return CacheSize(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def cache_size(
    scheme: Scheme,
    heads: int,
    dim: int,
    layers: int,
    tokens: int,
    *,
    batch: int = 1,
    window: int | None = None,
    uses_gradients: bool = False,
) -> CacheSize:
    """Return the size of a packed cache.

    Slabs of 8 pages and the fp16 buffer are allocated whole. A layer with a sliding window frees a slab once all
    of it is out of sight; counted is the maximum over tokens that are appended one at a time.

    Args:
        scheme: storage scheme.
        heads: key/value heads of a layer.
        dim: head dimension.
        layers: number of such layers.
        tokens: tokens per row that were appended.
        batch: rows.
        window: length of the sliding window, None for full attention.
        uses_gradients: calibration stores a weight per channel, see `calibrated_shapes`.

    Raises:
        RecipeError: heads of this size do not suit the scheme.
    """
    layout = PageLayout(scheme, heads, dim)
    rows = layers * batch
    pages = rows * SLAB * num_slabs(scheme, tokens, window)
    words = {"codes": 0, "scale": 0, "zero": 0, "outlier_value": 0, "outlier_index": 0}
    for name, part in layout.parts.items():
        words[name.partition(".")[2]] += part.words
    tables = sum(_table_numbers(tensor, heads * dim, uses_gradients) for tensor in (scheme.keys, scheme.values))
    return CacheSize(
        codes=4 * pages * words["codes"],
        scales=4 * pages * (words["scale"] + words["zero"]),
        outliers=4 * pages * (words["outlier_value"] + words["outlier_index"]),
        floats=2 * rows * heads * dim * (scheme.sink + scheme.buffer_size) * _FP16_BYTES,
        tables=_FP32_BYTES * layers * tables,
    )


def layer_cache_size(
    method: KVMethod | None,
    layer: CachedLayer,
    layers: int,
    tokens: int,
    batch: int = 1,
    scheme: Scheme | None = None,
) -> CacheSize:
    """Return the size of the cache of equal layers, packed or in fp16.

    Args:
        method: KV method; None for an ordinary cache in fp16.
        layer: shape of a layer.
        layers: number of such layers.
        tokens: tokens per row that were appended.
        batch: rows.
        scheme: of these layers; without one that of the method's first layer.

    Raises:
        RecipeError: heads of this size do not suit the method.
    """
    if method is None:
        return CacheSize(floats=_FP16_BYTES * layers * batch * layer.num_elements(tokens))
    return cache_size(
        scheme or method.layer_scheme(0),
        layer.heads,
        layer.dim,
        layers,
        tokens,
        batch=batch,
        window=layer.window,
        uses_gradients=method.uses_gradients,
    )


def num_slabs(scheme: Scheme, tokens: int, window: int | None = None) -> int:
    """Return the slabs of a row of a layer.

    Args:
        scheme: storage scheme.
        tokens: tokens that were appended.
        window: length of the sliding window; the maximum until `tokens` is returned with one.
    """
    pages = max(0, tokens - scheme.residual - 1) // PAGE  # the last token's page is packed with the next token
    needed = -(-pages // SLAB)
    if window is None:
        return needed
    visible = -(-(window - scheme.residual) // PAGE)
    return min(needed, max(1, -(-(visible + SLAB - 1) // SLAB)))  # its first page may be the last of a slab


def _calibrated_numbers(scheme: TensorScheme, channels: int, uses_gradients: bool = False) -> int:
    return sum(prod(shape) for shape in calibrated_shapes(scheme, channels, uses_gradients).values())


def _table_numbers(scheme: TensorScheme, channels: int, uses_gradients: bool) -> int:
    """Return the numbers stored once per layer: calibrated parameters, and levels that are not calibrated."""
    fixed_levels = 0 if scheme.levels == "learned" else 1 << scheme.bits
    return _calibrated_numbers(scheme, channels, uses_gradients) + fixed_levels


def packed_shapes(model: nn.Module, name: str = "") -> dict[int, tuple[int, int]]:
    """Return the shapes of the keys and values that are packed; parameters on the meta device suffice.

    Args:
        model: a decoder.
        name: of the model, for error messages.

    Returns:
        Layer index -> (heads, head dimension).

    Raises:
        UsageError: the model is an encoder, or no layer has keys and values that can be packed.
    """
    config: Any = getattr(model, "config", None)
    name = name or type(model).__name__
    task = task_for(config)
    if config is None or not task.generates:
        raise UsageError(f"{name} is {task.description}, which keeps no keys and values; leave out --kv.")
    modules, shapes = attention_modules(model), {}
    for number in packed_layers(config):
        heads, dim = kv_heads_and_dim(config.get_text_config(decoder=True), name)
        shapes[number] = heads, int(getattr(modules.get(number), "head_dim", None) or dim)
    if not shapes:
        raise UsageError(f"{name} has no layer with keys and values that could be packed; leave out --kv.")
    return shapes


def packed_layers(config: Any) -> list[int]:
    """Return the indices of the layers whose cache is one of keys and values, which can be packed."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return [number for number, layer in enumerate(_cache_layers(config)) if type(layer) in kinds]


def _cache_layers(config: Any) -> list[Any]:
    """Return the layers of transformers' cache; none for a config that transformers cannot count layers of."""
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def check_method(model: nn.Module, method: KVMethod, name: str = "") -> None:
    """Raise an error when a method cannot store the model's keys and values.

    Args:
        model: a decoder; parameters on the meta device suffice.
        method: KV method.
        name: of the model, for error messages.

    Raises:
        UsageError: the model has no layer that can be packed, or no rotary embedding that can be undone.
        RecipeError: its heads do not suit the method.
    """
    config: Any = model.config
    method.check_layers(config.get_text_config(decoder=True).num_hidden_layers)
    for number, (heads, dim) in packed_shapes(model, name).items():
        scheme = method.layer_scheme(number)
        check_heads(scheme, heads, dim)
        rope_to_undo(model, scheme, number)


def check_heads(scheme: Scheme, heads: int, dim: int) -> None:
    """Raise an error when heads do not suit a scheme.

    Args:
        scheme: storage scheme.
        heads: key/value heads of a layer.
        dim: head dimension.

    Raises:
        RecipeError: a group does not divide the head dimension, or no Hadamard matrix of it is available.
    """
    PageLayout(scheme, heads, dim)
    if scheme.keys.rotated or scheme.values.rotated:
        hadamard_rotation(dim)


def page_bits(model: nn.Module, method: KVMethod) -> float:
    """Return the bits per number of full pages, the limit for long contexts.

    Args:
        model: a decoder; parameters on the meta device suffice.
        method: KV method.
    """
    shapes = packed_shapes(model)
    words = sum(PageLayout(method.layer_scheme(n), heads, dim).words for n, (heads, dim) in shapes.items())
    return 32 * words / sum(2 * PAGE * heads * dim for heads, dim in shapes.values())


def calibration_bytes(model: nn.Module, method: KVMethod) -> int:
    """Return the bytes of the tensors of a calibration; 0 for a method without one.

    Args:
        model: a decoder; parameters on the meta device suffice.
        method: KV method.
    """
    scheme, shapes = method.scheme(), packed_shapes(model).values()
    tensors = (scheme.keys, scheme.values)
    return _FP32_BYTES * sum(
        _calibrated_numbers(tensor, heads * dim, method.uses_gradients)
        for heads, dim in shapes
        for tensor in tensors
    )
