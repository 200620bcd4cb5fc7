"""The packed layer against a float reference: any lengths, chunks, paddings, crops and reorders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmill.errors import UsageError
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.rope import Rope
from helpers.packed_cache import SETTINGS, SlowLayer, both_sides, method_of
from helpers.selection import one_of_each

HEADS, DIM = 2, 16
ROPE = Rope(10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)))


def layer_of(setting, **options):
    scheme = method_of(setting).scheme()
    rope = ROPE if scheme.pre_rope else None
    return QuantizedLayer(scheme, both_sides(scheme, HEADS * DIM), rope, **options)


def numbers(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, HEADS, tokens, DIM, generator=generator) * 2


def same(layer, slow, start):
    """Return True if both hold equal numbers outside of the padding."""
    first = layer.first_visible(0)
    assert layer.get_mask_sizes(3) == slow.get_mask_sizes(3)
    for ours, theirs in zip((layer.keys, layer.values), slow.floats(first), strict=True):
        for row, begin in enumerate(start):
            cut = max(0, begin - first)
            torch.testing.assert_close(ours[row, :, cut:], theirs[row, :, cut:], atol=2e-3, rtol=2e-3)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 90)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 50)),
        st.tuples(st.just("rows"), st.integers(0, 1000)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("setting", one_of_each(SETTINGS, lambda setting: setting[0]), ids=str)
@settings(max_examples=12)
@given(steps=steps, padding=st.lists(st.integers(0, 40), min_size=2, max_size=2), prompt=st.integers(41, 120))
def test_random_operations(setting, steps, padding, prompt):
    layer = layer_of(setting)
    start = torch.tensor(padding)
    slow = SlowLayer(layer, start)
    layer.buffer.set_start(start)
    for seed, (what, number) in enumerate([("append", prompt), *steps]):
        if what == "append":
            states = numbers(len(slow.start), number, seed)
            layer.append(*states)
            slow.append(*states)
        elif what == "crop" and number < layer.length - 40:
            layer.crop(-number)
            slow.crop(-number)
        elif what == "rows":
            order = torch.tensor([number % len(slow.start), number // 7 % len(slow.start)])
            layer.reorder_cache(order)
            slow.reorder_cache(order)
        elif what == "repeat" and len(slow.start) < 5:
            layer.batch_repeat_interleave(number)
            slow.batch_repeat_interleave(number)
        same(layer, slow, slow.start.tolist())
        assert layer.buffer.start.tolist() == slow.start.tolist()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@settings(max_examples=8)
@given(chunks=st.lists(st.integers(1, 300), min_size=2, max_size=4))
def test_chunk_size_does_not_matter(setting, chunks):
    states = numbers(1, sum(chunks), 0)
    whole, pieces = layer_of(setting), layer_of(setting)
    whole.append(*states)
    for piece in states.split(chunks, -2):
        pieces.append(*piece)
    for ours, theirs in zip((whole.keys, whole.values), (pieces.keys, pieces.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert whole.allocated_bytes == pieces.allocated_bytes


@pytest.mark.parametrize("setting", SETTINGS[:4], ids=str)
@settings(max_examples=10)
@given(chunks=st.lists(st.integers(1, 150), min_size=3, max_size=8), window=st.integers(5, 90))
def test_windows(setting, chunks, window):
    layer = layer_of(setting, window=window)
    slow = SlowLayer(layer)
    for seed, tokens in enumerate(chunks):
        states = numbers(1, tokens, seed)
        layer.append(*states)
        slow.append(*states)
        same(layer, slow, [0])
        assert layer.elements == 2 * HEADS * DIM * min(layer.length, window - 1)
    assert layer.length - layer.buffer.pages.first <= window + 256 + layer.buffer.num_unpacked  # whole slabs


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_cached_decode_equals_stored(setting, window):
    layer, plain = layer_of(setting, cache_decoded=True, window=window), layer_of(setting, window=window)
    for seed, tokens in enumerate((70, 32, 32, 1, 33, 300, 90)):
        states = numbers(2, tokens, seed)
        for ours, theirs in zip(layer.update(*states), plain.update(*states), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if window is None:
        layer.crop(-30)
        plain.crop(-30)
    torch.testing.assert_close(layer.keys, plain.keys, atol=1e-5, rtol=1e-5)


def test_current_page_is_float():
    """The last of a page too, come they one by one or a page at a time: evaluation is like generation."""
    setting = ("per_token", {"bits": 2})
    states = numbers(1, 96, 3)
    layer, paged = layer_of(setting), layer_of(setting)
    for at in range(96):
        layer.append(*states[..., at : at + 1, :])
        assert torch.equal(
            layer.keys[..., at // 32 * 32 :, :], states[0][..., at // 32 * 32 : at + 1, :].half().float()
        )
        if at % 32 == 0:
            keys, _ = paged.update(*states[..., at : at + 32, :])
            assert torch.equal(keys[..., :at, :], layer.keys[..., :at, :])


def test_prompt_attends_in_float():
    layer = layer_of(SETTINGS[2])
    states = numbers(1, 100, 0)
    keys, values = layer.update(*states)
    assert torch.equal(keys, states[0])
    assert torch.equal(values, states[1])
    keys, _ = layer.update(*states)
    assert torch.equal(keys[..., 100:, :], states[0])
    assert not torch.equal(keys[..., :100, :], states[0])


def test_sinks_and_tail_are_fp16():
    layer = layer_of(("kvquant", {"bits": 2, "sink": 5, "equalize": False, "residual": 0}))
    start = torch.tensor([0, 30])
    layer.buffer.set_start(start)
    states = numbers(2, 75, 1)
    layer.append(*states)
    for ours, given_ in zip((layer.keys, layer.values), states.half().float(), strict=True):
        for row, begin in enumerate(start.tolist()):
            assert torch.equal(ours[row, :, begin : begin + 5], given_[row, :, begin : begin + 5])
            assert not torch.equal(ours[row, :, begin : begin + 6], given_[row, :, begin : begin + 6])
        assert torch.equal(ours[..., 64:, :], given_[..., 64:, :])


def test_padding_excluded_from_range():
    setting = ("kivi", {"bits": 4, "group": 8, "residual": 0})
    states = numbers(1, 64, 2)
    alone = layer_of(setting)
    alone.append(*states)
    padded = layer_of(setting)
    padded.buffer.set_start(torch.tensor([32 + 7]))
    padded.append(*torch.cat([torch.full((2, 1, HEADS, 39, DIM), 1000.0), states], -2))
    assert (padded.keys[..., 39 : 39 + 25, :] - states[0][..., :25, :]).abs().max() < 1


def test_crop_limits():
    layer = layer_of(SETTINGS[0], window=40)
    layer.append(*numbers(1, 900, 0))
    layer.append(*numbers(1, 1, 1))
    with pytest.raises(UsageError, match="activate_past_recording"):
        layer.crop(-800)
    with pytest.raises(UsageError, match="negative"):
        layer.crop(3)
    layer.activate_past_recording()
    layer.append(*numbers(1, 700, 2))
    layer.crop(-690)
    assert layer.length == 911
    layer.crop(-911)
    assert layer.length == 0
    assert layer.allocated_bytes == 0


def test_unequal_heads_refused():
    layer = layer_of(SETTINGS[0])
    with pytest.raises(UsageError, match="as many of both"):
        layer.append(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_byte_counts(setting):
    """By hand: slabs of eight pages, and fp16 for the sinks, the residual and a page."""
    layer = layer_of(setting)
    layer.append(*numbers(3, 32 * 9 + layer.scheme.residual, 0))
    layer.buffer.pack_full_page()
    name = setting[0]
    scheme, channels = layer.scheme, HEADS * DIM
    page = 0
    for is_key, side in ((True, scheme.keys), (False, scheme.values)):
        page += channels * 32 * side.bits // 8
        if is_key:  # the codes of a token's head end with a word
            page += HEADS * 32 * (-DIM * side.bits % 32) // 8
        outliers = round(side.outliers * channels) or (1 if side.outliers else 0)
        page += outliers * 32 * 3
        numbers_of = {"static": 0, "channel": 0, "page": channels, "token": 32 * side.num_groups(HEADS, DIM)}[
            side.axis
        ]
        page += numbers_of * (2 if name == "rotated" else 4)
    fp16_buffer = (scheme.sink + scheme.residual + 32) * channels * 2 * 2
    assert layer.buffer.pages.layout.words * 4 == page
    assert layer.allocated_bytes == 3 * (16 * page + fp16_buffer)
    assert layer.elements == 3 * 2 * channels * layer.length


def test_growth_does_not_copy():
    layer = layer_of(SETTINGS[0])
    layer.append(*numbers(1, 300, 0))
    before = [slab.data_ptr() for slab in layer.buffer.pages.slabs]
    layer.append(*numbers(1, 3000, 1))
    assert [slab.data_ptr() for slab in layer.buffer.pages.slabs][: len(before)] == before


def test_fp16_clamping():
    layer = layer_of(("per_token", {"bits": 8}))
    layer.append(*(numbers(1, 40, 0) * 1e6))
    assert torch.isfinite(layer.keys).all()
    assert torch.isfinite(layer.values).all()


def test_inference_and_grad_modes():
    layer = layer_of(SETTINGS[3])
    with torch.inference_mode():
        layer.append(*numbers(2, 50, 0))
        layer.reorder_cache(torch.tensor([1, 0]))
    states = numbers(2, 50, 1).requires_grad_()
    keys, _ = layer.update(*states)
    assert keys.requires_grad
    assert not layer.keys.requires_grad
    with torch.no_grad():
        layer.append(*numbers(2, 1, 2))
    with torch.inference_mode():
        layer.append(*numbers(2, 40, 2))
    assert layer.keys.shape == (2, HEADS, 141, DIM)
