"""Attention of one token a row that reads packed tokens where they lie (bitmill.runtime.attention.plan)."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import PAGE, TensorScheme
from bitmill.runtime.attention.dispatch import NativeTokenViews, attend, unsupported_reason
from bitmill.runtime.attention.plan import LayerPlan, PackedPast, PagePlan, TensorPlan


class AttentionKernelArgs:
    """Calls the kernel on a layer's tokens.

    why_not: None, or one sentence that says why no kernel takes them.
    """

    def __init__(self, tokens: TokenBuffer) -> None:
        self.tokens, self._known = tokens, NativeTokenViews()
        keys, values = tokens.pages.keys, tokens.pages.values
        rope = tokens.rope if tokens.scheme.pre_rope else None
        frequencies = None if rope is None else rope.frequencies.to(tokens.device).contiguous()
        levels = keys.levels.repeat(1, 16 // keys.levels.shape[1]) if keys.levels.dim() == 2 else keys.levels
        self._layer = LayerPlan(
            plan_of(tokens.pages.layout),
            levels.flatten(),
            values.levels,
            keys.scale,
            keys.zero,
            frequencies,
            1.0 if rope is None else rope.factor,
            keys.rotation,
            values.rotation,
            values.mean,
            values.deviation,
        )
        self.unsupported_reason = unsupported_reason(self._layer.pages, tokens.device)
        if os.environ.get("BITMILL_KERNEL") == "reference":
            self.unsupported_reason = "BITMILL_KERNEL is reference; packed tokens are decoded."
        self._loose: Tensor | None = None
        self._told: Any = None

    def attend(self, query: Tensor, scaling: float, first: Tensor) -> Tensor:
        """Attention of query (rows, query heads, dim) over slots from `first` (rows,) int32 on, fp32."""
        tokens, pages = self.tokens, self.tokens.pages
        self._look()
        assert tokens.start is not None
        past = PackedPast(
            pages.slabs,
            pages.first,
            pages.pages * PAGE,
            self._keys,
            self._values,
            tokens.scheme.sink,
            tokens.num_unpacked,
            tokens.start,
            first,
        )
        keys, values = pages.keys, pages.values
        out = attend(keys.to_storage_basis(query[:, :, None])[:, :, 0], self._layer, past, scaling, self._known)
        if not values.has_storage_basis:
            return out
        heads = out.unflatten(1, (tokens.heads, -1))  # of the query heads that share one of the values'
        return values.from_storage_basis(heads).flatten(1, 2)

    def block(self) -> Any:
        """The tokens as the compiled step reads and extends them (csrc/bind_kv.h: KvBlock), as they are now."""
        self._look()
        told = self._known.update(self.tokens.pages.slabs, self._keys, self._values)
        if told is not self._told:
            self._told, self._block = told, self._layer.block(told)
        return self._block

    def _look(self) -> None:
        """The kernel knows tensors by identity."""
        if self._loose is not self.tokens.fp16_buffer:
            self._loose = self.tokens.fp16_buffer
            self._keys, self._values = self.tokens.fp16_buffer


def plan_of(layout: PageLayout) -> PagePlan:
    """Where the kernel finds the parts of a page."""

    def side(name: str, kind: TensorScheme) -> TensorPlan:
        prefix = f"{name}."
        places = {n.removeprefix(prefix): part.offset for n, part in layout.parts.items() if n.startswith(prefix)}
        groups, outliers = kind.groups(layout.heads, layout.dim), kind.outlier_count(layout.heads * layout.dim)
        return TensorPlan(kind.bits, kind.axis, groups, outliers, **places)

    scheme = layout.scheme
    return PagePlan(layout.heads, layout.dim, layout.words, side("key", scheme.keys), side("value", scheme.values))
