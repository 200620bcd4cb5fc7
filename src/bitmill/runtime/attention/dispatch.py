"""Attention of one token per row on packed keys and values, by the compiled kernel (csrc/kv/kv.h) or by Triton.

Arithmetic is fp32. With b = scale * max over slots of sum_c |q_c k_c|, and m the largest |v| of the channel,

    |error of out| <= 2^-20 * (1 + b) * m
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitmill.native import native, threads
from bitmill.native import unsupported_reason as native_unsupported_reason
from bitmill.runtime.attention.plan import BITS, LayerPlan, PackedPast, PagePlan
from bitmill.runtime.triton.available import unsupported_reason as triton_unsupported_reason


def unsupported_reason(plan: PagePlan, device: torch.device) -> str | None:
    """Check whether a kernel reads pages of a layout.

    Args:
        plan: Layout of a page.
        device: Device of the pages.

    Returns:
        None, or one sentence with the reason why no kernel does.
    """
    if plan.dim % 16:
        return f"Heads have {plan.dim} numbers; kernels take multiples of 16."
    for part in (plan.key, plan.value):
        if part.bits not in BITS:
            return f"Codes have {part.bits} bits; kernels take 2, 3, 4 and 8."
        if part.groups > 1 and plan.heads * plan.dim // part.groups % 16:
            return f"{plan.heads * plan.dim // part.groups} channels share a scale; kernels take multiples of 16."
    if device.type == "cpu":
        return native_unsupported_reason("kv_attend")
    return triton_unsupported_reason(device)


class NativeTokenViews:
    """The extension's view of a past's tensors, kept from call to call: creating it takes longer than a call."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._fp16: tuple[Tensor, Tensor] | None = None
        self._tokens: Any = None

    def update(self, slabs: Sequence[Tensor], keys: Tensor, values: Tensor) -> Any:
        """Return the extension's view, rebuilt if a tensor was replaced; appended slabs are added to it.

        Args:
            slabs: Pages, as in PackedPast.
            keys: fp16 keys, as in PackedPast.
            values: fp16 values, as in PackedPast.

        Returns:
            The KvTokens.
        """
        previous, fp16 = self._slabs, self._fp16
        same = fp16 is not None and fp16[0] is keys and fp16[1] is values
        if not same or len(previous) > len(slabs) or any(a is not b for a, b in zip(previous, slabs)):
            self._fp16, self._slabs = (keys, values), []
            self._tokens = native().KvTokens(keys.view(torch.int16), values.view(torch.int16))
        for slab in slabs[len(self._slabs) :]:
            self._tokens.append(slab)
            self._slabs.append(slab)
        return self._tokens


def attend(
    q: Tensor, layer: LayerPlan, past: PackedPast, scale: float, views: NativeTokenViews | None = None
) -> Tensor:
    """Compute softmax(scale * q K^T) V for one token per row.

    Args:
        q: (rows, query heads, dim), after RoPE.
        layer: Constants of the layer.
        past: Keys and values to attend to.
        scale: Factor of the scores.
        views: Views to keep from call to call.

    Returns:
        fp32 (rows, query heads, dim); rows without visible tokens are 0.

    Raises:
        ValueError: if the shapes of the parts do not match.
    """
    if q.device.type != "cpu":
        from bitmill.runtime.attention.triton_attention import attend as attend_triton  # Triton is optional

        return attend_triton(q, layer, past, scale)
    out = torch.empty(q.shape, dtype=torch.float32)
    tokens = (views or NativeTokenViews()).update(past.slabs, past.fp16_keys, past.fp16_values)
    q = q.float().contiguous()
    counts = (past.first_slot, past.packed, past.sinks, past.tail)
    native().kv_attend(layer.native, tokens, q, *counts, past.start, past.first, scale, out, threads())
    return out
