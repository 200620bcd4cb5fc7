"""Packed keys and values to attend to, and attention on them in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitmill.kv.buffer import PageStore
from bitmill.kv.codec import CalibratedParams, TensorCodec
from bitmill.kv.kernel_args import page_plan
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import Rope
from bitmill.kv.scheme import Scheme, TensorScheme
from bitmill.runtime.attention.plan import LayerPlan, PackedPast

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Sizes of a past. starts, firsts: of each row."""

    keys: TensorScheme
    values: TensorScheme
    heads: int = 2
    group: int = 1
    dim: int = 64
    packed: int = 96
    tail: int = 5
    sinks: int = 0
    first_slot: int = 0
    starts: tuple[int, ...] = (0,)
    firsts: tuple[int, ...] = (0,)
    pre_rope: bool = False


def calibrated(side: TensorScheme, x: Tensor) -> CalibratedParams:
    own = (x.shape[-1],) if side.axis == "channel" else ()
    levels = torch.randn(*own, 1 << side.bits).sort().values if side.levels == "learned" else None
    if side.axis != "static":
        return CalibratedParams(levels=levels)
    low, high = x.amin((0, 1)), x.amax((0, 1))
    top = (1 << side.bits) - 1 if levels is None else 2
    return CalibratedParams(((high - low) / top).clamp(min=1e-3), low, levels)


class Made(NamedTuple):
    """Packed tokens. keys, values (rows, heads, slots, dim): their floats. counted (rows, slots)."""

    q: Tensor
    layer: LayerPlan
    past: PackedPast
    keys: Tensor
    values: Tensor
    counted: Tensor


def made(case: Case, seed: int = 0) -> Made:
    """A past of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows, channels, end = len(case.starts), case.heads * case.dim, case.first_slot + case.packed
    shape = (rows, case.packed, channels)
    numbers = [torch.randn(shape, generator=generator) * torch.rand(channels, generator=generator) for _ in "kv"]
    coders = [
        TensorCodec.from_params(
            side,
            case.heads,
            case.dim,
            calibrated(side, x) if case.packed else CalibratedParams(*[torch.ones(channels)] * 2),
        )
        for side, x in zip((case.keys, case.values), numbers)
    ]
    scheme = Scheme(case.keys, case.values, case.pre_rope, case.sinks)
    layout = PageLayout(scheme, case.heads, case.dim)
    store = PageStore(layout, coders[0], coders[1], rows, CPU)
    store.append(*numbers)
    for slab in store.slabs[-1:]:
        slab[:, (store.num_pages - 1) % slab.shape[1] + 1 :] = -1  # scales that are NaN, in pages not in use
    keys, values = (x.unflatten(-1, (case.heads, case.dim)).transpose(1, 2) for x in store.read(0, case.packed))
    rope = Rope(10000.0 ** -(torch.arange(0, case.dim, 2).double() / case.dim), 1.25)
    start = torch.tensor(case.starts)
    slots = torch.arange(case.first_slot, end)
    if case.pre_rope:
        keys = rope.apply(keys.double(), slots - start[:, None])
    fp16_buffer = torch.full(
        (2, rows, case.heads, case.sinks + case.tail + 3, case.dim), float("nan"), dtype=torch.float16
    )
    used = (2, rows, case.heads, case.sinks + case.tail, case.dim)
    fp16_buffer[:, :, :, : used[3]] = torch.randn(used, generator=generator).half()
    keys = torch.cat([keys.double(), fp16_buffer[0, :, :, case.sinks : used[3]].double()], 2)
    values = torch.cat([values.double(), fp16_buffer[1, :, :, case.sinks : used[3]].double()], 2)
    for row, begin in enumerate(case.starts):
        for i in range(case.sinks):
            if case.first_slot <= begin + i < end:
                keys[row, :, begin + i - case.first_slot] = fp16_buffer[0, row, :, i].double()
                values[row, :, begin + i - case.first_slot] = fp16_buffer[1, row, :, i].double()
            elif begin + i >= end:
                fp16_buffer[:, row, :, i] = float("nan")
    first = torch.tensor(case.firsts)
    static = case.keys.axis == "static"
    levels = coders[0].levels.values
    if levels.dim() == 2:
        levels = levels.repeat(1, 16 // levels.shape[1]).flatten()
    layer = LayerPlan(
        page_plan(layout), levels, coders[1].levels.values,
        coders[0].scale if static else None, coders[0].zero if static else None,
        rope.frequencies if case.pre_rope else None, rope.factor,
    )  # fmt: skip
    places = (case.sinks, case.tail, start.int(), first.int())
    past = PackedPast(store.slabs, case.first_slot, case.packed, fp16_buffer[0], fp16_buffer[1], *places)
    q = torch.randn(rows, case.heads * case.group, case.dim, generator=generator)
    counted = torch.arange(case.first_slot, end + case.tail) >= first[:, None]
    return Made(q, layer, past, keys, values, counted)


def exact(made: Made, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in fp64, and what the bound of runtime.attention multiplies 2^-20 by."""
    q, keys, values = made.q, made.keys, made.values
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    hidden = ~made.counted[:, None, :]
    scores = (scale * torch.einsum("rhd,rhsd->rhs", q.double(), keys)).masked_fill(hidden, -torch.inf)
    reach = scale * torch.einsum("rhd,rhsd->rhs", q.double().abs(), keys.abs()).masked_fill(hidden, 0).amax(-1)
    most = values.abs().masked_fill(hidden[..., None], 0).amax(2)
    return torch.einsum("rhs,rhsd->rhd", scores.softmax(-1), values), (1 + reach[..., None]) * most


def off(out: Tensor, made: Made, scale: float) -> float:
    """The largest error in units of that."""
    expected, unit = exact(made, scale)
    return float(((out.cpu() - expected).abs() / unit).max())
