"""Arguments of the attention kernel that reads packed tokens in place (bitmill.runtime.attention)."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import PAGE, TensorScheme
from bitmill.runtime.attention.dispatch import NativeTokenViews, attend, unsupported_reason
from bitmill.runtime.attention.plan import LayerPlan, PackedPast, PagePlan, TensorPlan

_KERNEL_LEVELS = 16  # per channel that the kernel reads: shorter tables are repeated


class AttentionKernelArgs:
    """Arguments of the attention kernel for the tokens of a layer.

    Args:
        tokens: allocated buffer.

    Attributes:
        unsupported_reason: None, or a sentence on why no kernel takes them.
    """

    def __init__(self, tokens: TokenBuffer) -> None:
        self.tokens, self._views = tokens, NativeTokenViews()
        keys, values = tokens.pages.keys, tokens.pages.values
        rope = tokens.rope if tokens.scheme.pre_rope else None
        frequencies = None if rope is None else rope.frequencies.to(tokens.device).contiguous()
        key_levels = keys.levels.values
        if key_levels.dim() == 2:
            key_levels = key_levels.repeat(1, _KERNEL_LEVELS // key_levels.shape[1])
        self._layer = LayerPlan(
            page_plan(tokens.pages.layout),
            key_levels.flatten(),
            values.levels.values,
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
        self._fp16_buffer: Tensor | None = None
        self._native_tokens: Any = None

    def attend(self, query: Tensor, scaling: float, first: Tensor) -> Tensor:
        """Compute the attention of one token per row.

        Args:
            query: (rows, query heads, dim), after RoPE.
            scaling: multiplier of the scores.
            first: (rows,) int32, first visible slot of each row.

        Returns:
            fp32 (rows, query heads, dim).
        """
        tokens, pages = self.tokens, self.tokens.pages
        self._refresh_views()
        assert tokens.start is not None
        past = PackedPast(
            pages.slabs,
            pages.first,
            pages.num_pages * PAGE,
            self._fp16_keys,
            self._fp16_values,
            tokens.scheme.sink,
            tokens.num_unpacked,
            tokens.start,
            first,
        )
        keys, values = pages.keys, pages.values
        query = keys.to_storage_basis(query[:, :, None])[:, :, 0]
        out = attend(query, self._layer, past, scaling, self._views)
        if not values.has_storage_basis:
            return out
        heads = out.unflatten(1, (tokens.heads, -1))  # query heads that share a value head
        return values.from_storage_basis(heads).flatten(1, 2)

    def block(self) -> Any:
        """Return the tokens as the compiled decode step reads and extends them (csrc/bind_kv.h: KvBlock)."""
        self._refresh_views()
        native_tokens = self._views.update(self.tokens.pages.slabs, self._fp16_keys, self._fp16_values)
        if native_tokens is not self._native_tokens:
            self._native_tokens, self._block = native_tokens, self._layer.block(native_tokens)
        return self._block

    def _refresh_views(self) -> None:
        """Split the fp16 buffer if it was replaced: the kernel identifies tensors by identity."""
        if self._fp16_buffer is not self.tokens.fp16_buffer:
            self._fp16_buffer = self.tokens.fp16_buffer
            self._fp16_keys, self._fp16_values = self.tokens.fp16_buffer


def page_plan(layout: PageLayout) -> PagePlan:
    """Return the offsets of the parts of a page, as the kernel takes them."""

    def tensor_plan(name: str, scheme: TensorScheme) -> TensorPlan:
        prefix = f"{name}."
        offsets = {n.removeprefix(prefix): part.offset for n, part in layout.parts.items() if n.startswith(prefix)}
        groups = scheme.num_groups(layout.heads, layout.dim)
        outliers = scheme.num_outliers(layout.heads * layout.dim)
        return TensorPlan(scheme.bits, scheme.axis, groups, outliers, **offsets)

    scheme = layout.scheme
    keys, values = tensor_plan("key", scheme.keys), tensor_plan("value", scheme.values)
    return PagePlan(layout.heads, layout.dim, layout.words, keys, values)
