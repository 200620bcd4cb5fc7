"""Attention of one token a row on packed keys and values, by the compiled kernel (csrc/kv/kv.h) or by Triton's.

Arithmetic is fp32. With b = scale * max over slots of sum_c |q_c k_c|, and m the largest |v| of the channel,

    |error of out| <= 2^-20 * (1 + b) * m
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bitmill.runtime.native import native, threads, why_none
from bitmill.runtime.triton.available import why_not

AXES = ("static", "page", "token", "channel")  # csrc/kv/kv.h: KvAxis
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class SidePlan:
    """How keys or values lie in a page: a part's first word, -1 for what is absent.

    axis: what has a scale of its own, see AXES.  groups, outliers: of a token.
    """

    bits: int
    axis: str
    groups: int
    outliers: int
    codes: int
    scale: int = -1
    zero: int = -1
    outlier_value: int = -1
    outlier_index: int = -1


@dataclass(frozen=True)
class PagePlan:
    """A page of 32 tokens, `words` int32 for `heads` heads of `dim` numbers; csrc/kv/kv.h and bitmill.kv.page."""

    heads: int
    dim: int
    words: int
    key: SidePlan
    value: SidePlan

    def why_not(self, device: torch.device) -> str | None:
        """None where a kernel takes such pages, or one sentence that says why none does."""
        if self.dim % 16:
            return f"Heads have {self.dim} numbers; kernels take multiples of 16."
        for side in (self.key, self.value):
            if side.bits not in BITS:
                return f"Codes have {side.bits} bits; kernels take 2, 3, 4 and 8."
            if side.groups > 1 and self.heads * self.dim // side.groups % 16:
                return (
                    f"{self.heads * self.dim // side.groups} channels share a scale; kernels take multiples of 16."
                )
        if device.type == "cpu":
            return why_none("kv_attend")
        return why_not(device)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What stays the same from token to token.

    key_levels, value_levels: fp32 (2**bits,), what codes stand for; keys' (channels, 16), repeated, of axis
        "channel".
    key_scale, key_zero: fp32 (heads * dim,), of a static axis.
    inv_freq: fp64 (dim / 2,), radians a position, where packed keys are stored before RoPE.
    rope_scaling: what RoPE multiplies keys by then.
    key_turn, value_turn: fp32 (dim, dim), value_mean, value_deviation: fp32 (heads * dim,), of the basis in which
        heads are stored where it is not the model's. The decode step moves to it and back; `attend` is given
        queries that are moved, and what it gives is to be moved back.
    """

    pages: PagePlan
    key_levels: Tensor
    value_levels: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    inv_freq: Tensor | None = None
    rope_scaling: float = 1.0
    key_turn: Tensor | None = None
    value_turn: Tensor | None = None
    value_mean: Tensor | None = None
    value_deviation: Tensor | None = None

    @cached_property
    def native(self) -> Any:
        """As the compiled kernel knows it."""
        numbers = (self.key_levels, self.value_levels, self.key_scale, self.key_zero, self.inv_freq)
        return native().KvLayer(_native_pages(self.pages), *numbers, self.rope_scaling)

    def block(self, tokens: Any) -> Any:
        """With tokens that `NativeTokenViews.of` gave, as the decode step reads and extends them."""
        moves = (self.key_turn, self.value_turn, self.value_mean, self.value_deviation)
        return native().KvBlock(self.native, tokens, *(None if x is None else x.flatten() for x in moves))


def _native_pages(plan: PagePlan) -> Any:
    library = native()  # no cache here: what outlives the interpreter's modules counts as leaked

    def side(s: SidePlan) -> Any:
        places = (s.codes, s.scale, s.zero, s.outlier_value, s.outlier_index)
        return library.KvSide(s.bits, AXES.index(s.axis), s.groups, s.outliers, *places)

    return library.KvPages(plan.heads, plan.dim, plan.words, side(plan.key), side(plan.value))


@dataclass
class Past:
    """What is attended to.

    slabs: int32 (rows, pages, words), the same number of pages each; the last may be filled in part.
    first_slot: slot of the first page's first token.  packed: tokens in pages, a multiple of 32.
    loose_keys, loose_values: fp16 (rows, heads, room, dim): `sinks` first tokens of each row, whose packed copies
        are not read, then `tail` tokens that follow the packed ones; keys after RoPE.
    start: (rows,) int32, slot of the first token that is no padding.  first: the first slot in sight.
    """

    slabs: Sequence[Tensor]
    first_slot: int
    packed: int
    loose_keys: Tensor
    loose_values: Tensor
    sinks: int
    tail: int
    start: Tensor
    first: Tensor


class NativeTokenViews:
    """A past's tensors as the compiled kernel knows them: kept from call to call, for telling it takes a while."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._loose: tuple[Tensor, Tensor] | None = None
        self._tokens: Any = None

    def of(self, slabs: Sequence[Tensor], keys: Tensor, values: Tensor) -> Any:
        """Of slabs and loose keys and values as in a Past; told anew where others are in place of those before."""
        mine, loose = self._slabs, self._loose
        same = loose is not None and loose[0] is keys and loose[1] is values
        if not same or len(mine) > len(slabs) or any(a is not b for a, b in zip(mine, slabs)):
            self._loose, self._slabs = (keys, values), []
            self._tokens = native().KvTokens(keys.view(torch.int16), values.view(torch.int16))
        for slab in slabs[len(self._slabs) :]:
            self._tokens.append(slab)
            self._slabs.append(slab)
        return self._tokens


def attend(q: Tensor, layer: LayerPlan, past: Past, scale: float, known: NativeTokenViews | None = None) -> Tensor:
    """softmax(scale * q K^T) V, fp32 (rows, query heads, dim), for q of that shape, after RoPE.

    known: what is kept from call to call.  Rows of which nothing is in sight become 0.
    Raises ValueError for parts that do not fit each other.
    """
    if q.device.type != "cpu":
        from bitmill.runtime.triton.kv import attend as on_device

        return on_device(q, layer, past, scale)
    out = torch.empty(q.shape, dtype=torch.float32)
    tokens = (known or NativeTokenViews()).of(past.slabs, past.loose_keys, past.loose_values)
    q = q.float().contiguous()
    counts = (past.first_slot, past.packed, past.sinks, past.tail)
    native().kv_attend(layer.native, tokens, q, *counts, past.start, past.first, scale, out, threads())
    return out
