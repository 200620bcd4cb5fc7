"""What a packed cache takes: bytes that are allocated, from a scheme and the shape of the layers alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from bitmill.kv.codec import calibrated_shapes
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import PAGE, Scheme, TensorScheme
from bitmill.kv.store import SLAB

_FLOAT, _FP32 = 2, 4  # bytes of a number in fp16 and in fp32


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the parts of a cache.

    codes: of keys and values.  scales: and zeros, of pages and tokens.  outliers: their values and places.
    floats: first tokens and the tail, in fp16.  tables: what calibration found, and the levels, in fp32; they grow
    with nothing.
    """

    codes: int = 0
    scales: int = 0
    outliers: int = 0
    floats: int = 0
    tables: int = 0

    @property
    def allocated(self) -> int:
        """What `QuantizedCache.allocated_bytes` says: all but the tables."""
        return self.total - self.tables

    @property
    def total(self) -> int:
        """All of it."""
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
    weighed: bool = False,
) -> CacheSize:
    """A cache that has taken `tokens` tokens a row, for `layers` layers of `heads` heads of `dim` numbers.

    Slabs of 8 pages are allocated whole, and the tail and the first tokens at their full length. A layer with a
    sliding window drops a slab once all of it is out of sight; the most that it holds of tokens that came one at a
    time is counted.
    Raises RecipeError where the scheme does not suit such heads.
    """
    layout = PageLayout(scheme, heads, dim)
    rows = layers * batch
    pages = rows * SLAB * slabs(scheme, tokens, window)
    words = {"codes": 0, "scale": 0, "zero": 0, "outlier_value": 0, "outlier_index": 0}
    for name, part in layout.parts.items():
        words[name.partition(".")[2]] += part.words
    return CacheSize(
        codes=4 * pages * words["codes"],
        scales=4 * pages * (words["scale"] + words["zero"]),
        outliers=4 * pages * (words["outlier_value"] + words["outlier_index"]),
        floats=2 * rows * heads * dim * (scheme.sink + scheme.tail) * _FLOAT,
        tables=_FP32 * layers * sum(_table(side, heads * dim, weighed) for side in (scheme.keys, scheme.values)),
    )


def slabs(scheme: Scheme, tokens: int, window: int | None = None) -> int:
    """Slabs that a row of a layer holds after `tokens` tokens, or at most until then with a window."""
    needed = -(-_pages(scheme, tokens) // SLAB)
    if window is None:
        return needed
    spanned = -(-(window - scheme.residual) // PAGE)
    return min(needed, max(1, -(-(spanned + SLAB - 1) // SLAB)))  # its first page may be the last of a slab


def _pages(scheme: Scheme, tokens: int) -> int:
    """Pages that are full, and not waiting in the tail: the last token's page waits for the next one."""
    return max(0, tokens - scheme.residual - 1) // PAGE


def calibrated_numbers(side: TensorScheme, channels: int, weighed: bool = False) -> int:
    """Numbers that calibration finds for one side of a layer; see `calibrated_shapes`."""
    return sum(prod(shape) for shape in calibrated_shapes(side, channels, weighed).values())


def _table(side: TensorScheme, channels: int, weighed: bool) -> int:
    """Numbers of a side that a layer holds once: what calibration found, and levels that need none."""
    return calibrated_numbers(side, channels, weighed) + (0 if side.levels == "learned" else 1 << side.bits)
