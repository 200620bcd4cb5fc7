"""Predicted sizes of caches equal allocations and the figures of the paper for LLaMA-7B."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.kv import KV_METHODS, Scheme
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.scheme import kv_method
from bitmill.kv.size import cache_size, num_slabs
from helpers.packed_cache import both_sides
from helpers.selection import thin

LLAMA_7B = (32, 128, 32)  # heads, head dim, layers
GIB = 2**30
PAPER = {"outliers": 0.01, "key_outliers": 0.01, "residual": 0, "channel_levels": False, "equalize": False}
PLAIN = {**PAPER, "outliers": 0.0, "key_outliers": 0.0, "sink": 0}


def every_scheme() -> list[tuple[str, Scheme]]:
    found = []
    for name in KV_METHODS.names():
        for bits in (2, 3, 4, 8):
            try:
                found.append((f"{name}-{bits}", kv_method(name, bits).scheme()))
            except RecipeError:
                continue
    return found


SCHEMES = every_scheme()
schemes = pytest.mark.parametrize("scheme", [s for _, s in SCHEMES], ids=[name for name, _ in SCHEMES])


def filled(scheme: Scheme, heads: int, dim: int, steps: list[int], batch: int, window: int | None) -> list[int]:
    """Allocated bytes of one layer after each append."""
    layer = QuantizedLayer(scheme, both_sides(scheme, heads * dim), None, window)
    sizes = []
    for step in steps:
        layer.append(torch.randn(batch, heads, step, dim), torch.randn(batch, heads, step, dim))
        sizes.append(layer.allocated_bytes)
    return sizes


@schemes
@pytest.mark.parametrize(("heads", "dim", "batch"), [(2, 32, 1), (1, 64, 3), (9, 32, 1)])
def test_bytes_equal_allocation(scheme: Scheme, heads: int, dim: int, batch: int) -> None:
    steps = [1, 30, 1, 1, 200, 31, 160, 33, 300]
    sizes = filled(scheme, heads, dim, steps, batch, None)
    for count, size in enumerate(sizes, 1):
        assert cache_size(scheme, heads, dim, 1, sum(steps[:count]), batch=batch).allocated == size


@pytest.mark.parametrize("window", thin([20, 64, 100, 250, 256, 257, 290, 513], [20, 257, 513]))
@pytest.mark.parametrize("name", ["kvquant", "kivi"])
def test_sliding_window_bytes(name: str, window: int) -> None:
    scheme = kv_method(name, 2).scheme()
    sizes = filled(scheme, 1, 32, [1] * 1200, 1, window)
    assert max(sizes) == cache_size(scheme, 1, 32, 1, 1200, window=window).allocated
    assert all(size <= cache_size(scheme, 1, 32, 1, n, window=window).allocated for n, size in enumerate(sizes, 1))


def test_llama_7b_at_two_bits() -> None:
    """Codes alone 64 GiB; scale and zero of a token of values are 4 bytes a layer more."""
    size = cache_size(kv_method("kvquant", 2, **PLAIN).scheme(), *LLAMA_7B, 1 << 20)
    assert size.codes == 64 * GIB
    assert size.scales == 32 * 4 * (1 << 20)
    assert size.outliers == 0
    assert size.floats == 2 * 32 * 4096 * 32 * 2
    assert size.tables == 32 * 4 * (2 * 4096 + 4 + 4)


def test_llama_7b_with_outliers() -> None:
    """41 of 4096 numbers, each 16 bits and as many for its place: 41 x 32 / 4096 = 0.3203 bits more."""
    size = cache_size(kv_method("kvquant", 2, **PAPER).scheme(), *LLAMA_7B, 1 << 20)
    assert size.outliers == 2 * 32 * 41 * 4 * (1 << 20)
    bits = 8 * size.allocated / (2 * 32 * 4096 * (1 << 20))
    assert bits == pytest.approx(2 + 41 * 32 / 4096 + 16 / 4096, abs=1e-3)


def test_kivi_at_two_bits() -> None:
    """A scale and a zero of 16 bits for 32 numbers: 1 bit more, besides 128 tokens in float."""
    size = cache_size(kv_method("kivi", 2).scheme(), *LLAMA_7B, 1 << 20)
    assert size.scales == 32 * 4096 * 2 * (1 << 20) * 4 // 32
    assert size.floats == 2 * 32 * 4096 * 128 * 2


def test_batch_and_layers_multiply() -> None:
    scheme = kv_method("kvquant", 3).scheme()
    one = cache_size(scheme, 2, 64, 1, 5000)
    many = cache_size(scheme, 2, 64, 7, 5000, batch=3)
    assert many.allocated == 21 * one.allocated
    assert many.tables == 7 * one.tables
    assert (one + one).total == 2 * one.total


def test_lengths() -> None:
    scheme = kv_method("kvquant", 4, residual=0).scheme()
    assert [num_slabs(scheme, n) for n in (0, 32, 33, 257, 288, 289)] == [0, 0, 1, 1, 1, 2]
    with pytest.raises(RecipeError, match="share a scale"):
        cache_size(kv_method("kivi", 4).scheme(), 2, 40, 1, 100)
