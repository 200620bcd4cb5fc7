"""kv_attend: attention of one token per row on packed keys and values, the counterpart of csrc/kv for GPUs.

A program processes some pages of one head of keys, for all query heads that share it, with a maximum and sums of
its own, which are merged at the end; the last one also processes the fp16 tokens. Arithmetic is fp32; angles are
fp64 until they are reduced to one turn. The bound is that of `attention.dispatch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill.runtime.attention.plan import PAGE_TOKENS, LayerPlan, PackedPast, TensorPlan

PAGES = 8  # of a program
_FULL_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _codes(words, streams, bit, inside, BITS: tl.constexpr):
    """Load codes that start at a bit of the lanes' streams, whose words have a stride of 16."""
    at = words + streams + bit // 32 * 16
    code = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (bit % 32).to(tl.uint32)
    if 32 % BITS != 0:  # a code may end in the next word
        cut = inside & (bit % 32 + BITS > 32)
        above = tl.load(at + 16, mask=cut, other=0).to(tl.uint32, bitcast=True)
        code |= above << ((32 - bit % 32) % 32).to(tl.uint32)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _numbers(
    page, code, levels, fixed_scale, fixed_zero, t, channel, inside,
    AXIS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, OUTLIERS: tl.constexpr,
    VALUE: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the numbers of codes, (32, channels), for t (32, 1) and channel (1, channels). WIDTH: of a group."""
    if AXIS == "channel":
        x = tl.load(levels + channel * 16 + code, mask=inside, other=0)
    else:
        x = tl.load(levels + code)
    if AXIS == "static":
        x *= tl.load(fixed_scale + channel, mask=inside, other=0)
        if fixed_zero is not None:
            x += tl.load(fixed_zero + channel, mask=inside, other=0)
    elif AXIS != "channel":
        halves = page.to(tl.pointer_type(tl.float16))
        at = channel if AXIS == "page" else channel // WIDTH * 32 + t
        x *= tl.load(halves + 2 * SCALE + at, mask=inside, other=0).to(tl.float32)
        if ZERO >= 0:
            x += tl.load(halves + 2 * ZERO + at, mask=inside, other=0).to(tl.float32)
    for e in range(OUTLIERS):
        value = tl.load(page.to(tl.pointer_type(tl.float16)) + 2 * VALUE + e * 32 + t).to(tl.float32)
        if WIDE:
            index = tl.load(page.to(tl.pointer_type(tl.uint16)) + 2 * INDEX + e * 32 + t).to(tl.int32)
        else:
            index = tl.load(page.to(tl.pointer_type(tl.uint8)) + 4 * INDEX + e * 32 + t).to(tl.int32)
        x += tl.where(channel == index, value, 0.0)
    return x


@triton.jit
def _softmax_step(scores, visible, maximum, weight, sums):
    """Return weights of 32 more tokens and the new maximum, with previous sums rescaled to it."""
    scores = tl.where(visible[None, :], scores, float("-inf"))
    top = tl.maximum(maximum, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp(scores - base[:, None])
    down = tl.exp(maximum - base)
    return p, top, weight * down + tl.sum(p, 1), sums * down[:, None]


@triton.jit
def _page_keys(
    page, levels, fixed_scale, fixed_zero, inv_freq, positions, head, f, real,
    DIM: tl.constexpr, KEY: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return both halves of the keys of a page, (32, DIM / 2 padded), after RoPE."""
    token = tl.arange(0, 32)[:, None]
    streams = (head * 2 + token // 16) * ((DIM * KEY[0] + 31) // 32) * 16 + token % 16
    code = _codes(page + KEY[1], streams, f * KEY[0], real, KEY[0])
    at = head * DIM + f
    a = _numbers(
        page, code, levels, fixed_scale, fixed_zero, token, at, real,
        KEY[2], KEY[3], KEY[4], KEY[5], KEY[6], KEY[7], KEY[8], WIDE,
    )  # fmt: skip
    code = _codes(page + KEY[1], streams, (f + DIM // 2) * KEY[0], real, KEY[0])
    b = _numbers(
        page, code, levels, fixed_scale, fixed_zero, token, at + DIM // 2, real,
        KEY[2], KEY[3], KEY[4], KEY[5], KEY[6], KEY[7], KEY[8], WIDE,
    )  # fmt: skip
    if ROPE:
        angle = positions[:, None].to(tl.float64) * tl.load(inv_freq + f, mask=f < DIM // 2, other=0)
        angle = (angle - tl.floor(angle / _FULL_TURN) * _FULL_TURN).to(tl.float32)
        cos, sin = tl.cos(angle), tl.sin(angle)
        rotated = b * cos + a * sin
        a = a * cos - b * sin
        b = rotated
    return tl.where(real, a, 0.0), tl.where(real, b, 0.0)


@triton.jit
def _fp16_tokens(
    keys, values, low, high, maximum, weight, sums, row_head, room, base, end, limit, sinks, tail, scale,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return maximum, weight and sums with the first and last tokens added, which are in fp16."""
    t, f, c = tl.arange(0, 32), tl.arange(0, HALF)[None, :], tl.arange(0, BLOCK)[None, :]
    for chunk in range(0, sinks + tail, 32):
        index = chunk + t
        slot = tl.where(index < sinks, base + index, end + index - sinks)
        visible = (index < sinks + tail) & (slot >= limit) & ((index >= sinks) | (slot < end))
        at = (row_head.to(tl.int64) * room + index[:, None]) * DIM
        mask = visible[:, None] & (f < DIM // 2)
        a = tl.load(keys + at + f, mask=mask, other=0).to(tl.float32)
        b = tl.load(keys + at + f + DIM // 2, mask=mask, other=0).to(tl.float32)
        scores = tl.dot(low, tl.trans(a), input_precision="ieee")
        scores = tl.dot(high, tl.trans(b), scores, input_precision="ieee") * scale
        p, maximum, weight, sums = _softmax_step(scores, visible, maximum, weight, sums)
        v = tl.load(values + at + c, mask=visible[:, None] & (c < DIM), other=0).to(tl.float32)
        sums = tl.dot(p, v, sums, input_precision="ieee")
    return maximum, weight, sums


@triton.jit
def kv_attend(
    q, tables, fp16_keys, fp16_values, start, first, key_levels, value_levels, key_scale, key_zero, inv_freq,
    maxima, weights, outs, first_slot, pages, room, sinks, tail, scale, packed_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WORDS: tl.constexpr, SLAB: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute maxima, weights and sums (rows, heads, programs, QUERIES[, BLOCK]).

    Args (the others are tensors of LayerPlan and PackedPast):
        tables: Addresses of slabs.
        maxima, weights, outs: The results.
        packed_scale: Factor of scores of packed tokens.
        KEY, VALUE: Bits, first word of the codes, then the constants of `_numbers`.
        STEP: Pages of a program.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t, i = tl.arange(0, 32), tl.arange(0, QUERIES)[:, None]
    f, c = tl.arange(0, HALF)[None, :], tl.arange(0, BLOCK)[None, :]
    token = t[:, None]
    base = tl.load(start + row)
    limit = tl.load(first + row)
    mine = q + ((row * HEADS + head) * GROUP + i) * DIM
    low = tl.load(mine + f, mask=(i < GROUP) & (f < DIM // 2), other=0)
    high = tl.load(mine + f + DIM // 2, mask=(i < GROUP) & (f < DIM // 2), other=0)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK], tl.float32)
    real = (f < DIM // 2) & (token < 32)
    inside = (c < DIM) & (token < 32)
    for number in range(part * STEP, tl.minimum(part * STEP + STEP, pages)):
        page = tl.load(tables + number // SLAB).to(tl.pointer_type(tl.int32))
        page += (row * SLAB + number % SLAB).to(tl.int64) * WORDS
        slot = first_slot + number * 32 + t
        a, b = _page_keys(
            page, key_levels, key_scale, key_zero, inv_freq, slot - base, head, f, real, DIM, KEY, ROPE, WIDE
        )
        scores = tl.dot(low, tl.trans(a), input_precision="ieee")
        scores = tl.dot(high, tl.trans(b), scores, input_precision="ieee") * packed_scale
        visible = (slot >= limit) & ((slot < base) | (slot >= base + sinks))
        p, maximum, weight, sums = _softmax_step(scores, visible, maximum, weight, sums)
        lanes = (head * (DIM // 16) + c // 16) * VALUE[0] * 16 + c % 16
        code = _codes(page + VALUE[1], lanes, token * VALUE[0], inside, VALUE[0])
        v = _numbers(
            page, code, value_levels, None, None, token, head * DIM + c, inside,
            VALUE[2], VALUE[3], VALUE[4], VALUE[5], VALUE[6], VALUE[7], VALUE[8], WIDE,
        )  # fmt: skip
        sums = tl.dot(p, tl.where(inside & visible[:, None], v, 0.0), sums, input_precision="ieee")
    if part == tl.num_programs(2) - 1:
        maximum, weight, sums = _fp16_tokens(
            fp16_keys, fp16_values, low, high, maximum, weight, sums, row * HEADS + head, room, base,
            first_slot + pages * 32, limit, sinks, tail, scale, DIM, HALF, BLOCK,
        )  # fmt: skip
    out = (row * HEADS + head) * tl.num_programs(2) + part
    tl.store(maxima + out * QUERIES + tl.arange(0, QUERIES), maximum)
    tl.store(weights + out * QUERIES + tl.arange(0, QUERIES), weight)
    tl.store(outs + (out * QUERIES + i) * BLOCK + c, sums)


def _constants(side: TensorPlan, channels: int) -> tuple[int | str, ...]:
    width = channels // side.groups
    places = (side.scale, side.zero, side.outliers, side.outlier_value, side.outlier_index)
    return (side.bits, side.codes, side.axis, width, *places)


def attend(q: Tensor, layer: LayerPlan, past: PackedPast, scale: float) -> Tensor:
    """Compute softmax(scale * q K^T) V on a GPU.

    Args:
        q: (rows, query heads, dim), after RoPE.
        layer: Constants of the layer.
        past: Keys and values to attend to.
        scale: Factor of the scores.

    Returns:
        fp32 (rows, query heads, dim).
    """
    plan, device = layer.pages, q.device
    rows, queries, dim = q.shape
    group, pages = queries // plan.heads, past.packed // PAGE_TOKENS
    parts = max(1, triton.cdiv(pages, PAGES))
    size, block = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim))
    tables = torch.tensor([slab.data_ptr() for slab in past.slabs] or [0], device=device)
    shape = (rows, plan.heads, parts, size)
    maximum, weight = torch.empty(shape, device=device), torch.empty(shape, device=device)
    sums = torch.empty(*shape, block, device=device)
    channels = plan.heads * dim
    with torch.cuda.device_of(q):
        kv_attend[(rows, plan.heads, parts)](
            q.float().contiguous(), tables, past.fp16_keys, past.fp16_values, past.start, past.first,
            layer.key_levels, layer.value_levels, layer.key_scale, layer.key_zero, layer.inv_freq,
            maximum, weight, sums, past.first_slot, pages, past.fp16_keys.shape[2], past.sinks, past.tail,
            scale, scale * (1.0 if layer.inv_freq is None else layer.rope_scaling),
            HEADS=plan.heads, GROUP=group, DIM=dim, WORDS=plan.words,
            SLAB=past.slabs[0].shape[1] if len(past.slabs) else 1,
            KEY=_constants(plan.key, channels), VALUE=_constants(plan.value, channels),
            ROPE=layer.inv_freq is not None, WIDE=channels > 256,
            QUERIES=size, HALF=max(16, block // 2), BLOCK=block, STEP=PAGES, num_warps=4,
        )  # fmt: skip
    top = maximum.amax(2, keepdim=True)
    factor = torch.exp(maximum - torch.where(top.isinf(), torch.zeros_like(top), top))
    total = (weight * factor).sum(2)[..., None]
    out = (sums * factor[..., None]).sum(2)
    out = torch.where(total == 0, torch.zeros_like(out), out / total)
    return out[:, :, :group, :dim].reshape(rows, queries, dim)
