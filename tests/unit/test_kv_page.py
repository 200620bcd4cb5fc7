"""Pages: what is written is read back, and every part lies where the layout says."""

from __future__ import annotations

import pytest
import torch

from bitmill.kv.base import PAGE, Scheme, Side
from bitmill.kv.page import PageLayout
from bitmill.kv.side import Coded, Coder
from bitmill.kv.store import SLAB, PageStore
from bitmill.numerics.packing import words_for
from packed import SETTINGS, both_sides, calibrated_at_random, method_of

SHAPES = [(3, 16), (1, 20), (4, 32), (3, 64), (5, 80), (2, 128), (1, 7)]


def random_coded(side, heads, dim, rows=2, pages=3):
    channels = heads * dim
    codes = torch.randint(0, 1 << side.bits, (rows, pages, PAGE, channels), dtype=torch.uint8)
    own = {"static": None, "page": (channels,), "token": (PAGE, side.groups(heads, dim))}[side.axis]
    scale = zero = value = index = None
    if own:
        scale = torch.randn(rows, pages, *own).half().float()
        zero = torch.randn(rows, pages, *own).half().float() if side.has_zero else None
    if count := side.outlier_count(channels):
        value = torch.randn(rows, pages, PAGE, count).half().float()
        index = torch.rand(rows, pages, PAGE, channels).argsort(-1)[..., :count]
    return Coded(codes, scale, zero, value, index)


def equal(a, b):
    for name in ("codes", "scale", "zero", "outlier_value", "outlier_index"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        assert x is None or torch.equal(x, y), name


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["static", "page", "token", "head", "outliers"])
def test_what_is_written_is_read(heads, dim, bits, kind):
    axis = kind if kind in ("static", "page") else "token"
    group = "head" if kind == "head" else None
    outliers = 0.02 if kind in ("static", "outliers") else 0.0
    scheme = Scheme(Side(bits, axis, group, outliers=outliers), Side(bits, "token", group, outliers=outliers))
    layout = PageLayout(scheme, heads, dim)
    keys, values = random_coded(scheme.keys, heads, dim), random_coded(scheme.values, heads, dim)
    slab = torch.zeros(2, SLAB, layout.words, dtype=torch.int32)
    layout.write(slab[:, 4:7], keys, values)
    for given, found in zip((keys, values), layout.read(slab[:, 4:7]), strict=True):
        equal(given, found)
    assert not slab[:, :4].any()
    assert not slab[:, 7:].any()
    wide = layout.parts.get("key.outlier_index")
    assert wide is None or wide.dtype == (torch.uint16 if heads * dim > 256 else torch.uint8)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_parts_follow_each_other(setting):
    layout = PageLayout(method_of(setting).scheme(), 3, 64)
    at = 0
    for part in layout.parts.values():
        assert part.offset == at
        at += part.words
    assert layout.words == at


def test_streams_lie_as_documented():
    """Keys: a lane is a token, along channels; values: a channel, along tokens; bits from the lowest on."""
    heads, dim, bits = 2, 20, 3
    scheme = Scheme(Side(bits, "page"), Side(bits, "token"))
    layout = PageLayout(scheme, heads, dim)
    keys, values = random_coded(scheme.keys, heads, dim, 1, 1), random_coded(scheme.values, heads, dim, 1, 1)
    page = torch.zeros(1, 1, layout.words, dtype=torch.int32)
    layout.write(page, keys, values)
    words = [int(word) & 0xFFFFFFFF for word in page.flatten()]
    wide = words_for(dim, bits)

    def stream(offset, count, lane):
        return sum(words[offset + 16 * i + lane] << (32 * i) for i in range(count))

    for head in range(heads):
        for token in range(PAGE):
            half, lane = divmod(token, 16)
            found = stream(layout.parts["key.codes"].offset + (head * 2 + half) * wide * 16, wide, lane)
            for c in range(dim):
                assert found >> (bits * c) & 7 == keys.codes[0, 0, token, head * dim + c]
        for c in range(dim):
            block, lane = divmod(c, 16)
            found = stream(layout.parts["value.codes"].offset + (head * 2 + block) * bits * 16, bits, lane)
            for token in range(PAGE):
                assert found >> (bits * token) & 7 == values.codes[0, 0, token, head * dim + c]
    scale = layout.parts["value.scale"]
    halves = page.view(torch.float16)[0, 0, 2 * scale.offset : 2 * scale.offset + PAGE]
    assert torch.equal(halves.float(), values.scale[0, 0, :, 0])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_store_gives_what_its_coders_give(setting):
    scheme, (heads, dim) = method_of(setting).scheme(), (2, 16)
    calibrated = both_sides(scheme, heads * dim)
    coders = [Coder(side, heads, dim, found) for side, found in zip((scheme.keys, scheme.values), calibrated)]
    store = PageStore(PageLayout(scheme, heads, dim), *coders, 2, torch.device("cpu"))
    x = torch.randn(2, 2, 13 * PAGE, heads * dim)
    store.append(*x[:, :, : 3 * PAGE])
    store.append(*x[:, :, 3 * PAGE :])
    for found, coder, numbers in zip(store.read(2 * PAGE, 12 * PAGE), coders, x):
        assert torch.equal(found, coder.decode(coder.encode(numbers[:, 2 * PAGE : 12 * PAGE])))
    assert len(store.slabs) == 2
    again = PageStore(PageLayout(scheme, heads, dim), *coders, 2, torch.device("cpu"))
    again.put(store.used(), 0)
    assert torch.equal(torch.cat(again.slabs, 1), torch.cat(store.slabs, 1))
    store.let_go(9 * PAGE)
    assert (store.first, store.pages, store.end) == (8 * PAGE, 5, 13 * PAGE)
    assert torch.equal(store.read(8 * PAGE, 9 * PAGE)[0], again.read(8 * PAGE, 9 * PAGE)[0])
    store.cut(9 * PAGE)
    assert (store.pages, len(store.slabs)) == (1, 1)
    assert store.read(9 * PAGE, 9 * PAGE)[0].shape == (2, 0, heads * dim)


def test_calibrations_of_the_tests_fit_normal_numbers():
    side = Side(4, "static", levels="learned")
    x = torch.randn(1, 320, 32)
    coder = Coder(side, 2, 16, calibrated_at_random(side, 32))
    assert (coder.decode(coder.encode(x)) - x).square().mean() < 0.1
