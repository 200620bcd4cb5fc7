"""Attention on packed keys and values, as an attention implementation of transformers.

All other calls of the model keep sdpa: this implementation takes over where a packed layer returned itself in
place of its keys (QuantizedLayer.update).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitmill.errors import UsageError
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.rope import attention_modules
from bitmill.kv.scheme import ATTENTION

_FALLBACK = "sdpa"
_UNSUPPORTED = ("position_bias", "softcap")  # further terms of a score


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention on a packed layer, or by sdpa on floats.

    Args:
        module: attention module of the model.
        query: (rows, query heads, tokens, dim); one token for packed layers.
        key: (rows, heads, tokens, dim), or an empty tensor that carries the packed layer.
        value: of the shape of `key`.
        attention_mask: as for sdpa.
        kwargs: further arguments of transformers.

    Returns:
        Output (rows, tokens, query heads, dim), and None in place of the attention weights.

    Raises:
        UsageError: the model changed the keys after they were cached, which loses the packed layer.
    """
    fallback: Any = ALL_ATTENTION_FUNCTIONS[_FALLBACK]
    layer: QuantizedLayer | None = getattr(key, "packed_layer", None)
    output: tuple[Tensor, Tensor | None]
    if layer is None:
        if not key.shape[-2]:
            raise UsageError(
                f"{type(module).__name__} changes keys after they were cached; use attention 'sdpa' for it."
            )
        output = fallback(module, query, key, value, attention_mask, **kwargs)
        return output
    first = first_visible_slots(layer, attention_mask)
    if first is None or any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        keys, values = layer.decode(layer.first_visible(1))
        output = fallback(module, query, keys, values, attention_mask, **kwargs)
        return output
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return layer.attend(query[:, :, 0], scaling, first)[:, None].to(query.dtype), None


def first_visible_slots(layer: QuantizedLayer, mask: Any) -> Tensor | None:
    """Return the first slot of each row that its last token attends to.

    Padding and sliding windows both hide the first tokens and no others.

    Args:
        layer: packed layer.
        mask: attention mask (rows, 1 or heads, queries, tokens), boolean or additive; None for none.

    Returns:
        (rows,) int32; None for a mask that hides other tokens.
    """
    rows, begin = layer.buffer.pages.rows, layer.first_visible(1)
    if mask is None:
        return torch.full((rows,), begin, dtype=torch.int32, device=layer.buffer.device)
    found: Tensor | str | None = getattr(mask, "first_visible_slots", "unknown")  # layers of a type share a mask
    if isinstance(found, str):
        is_visible = (
            mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2
        )
        hidden = is_visible.to(torch.int32).argmax(-1)
        hides_first_only = mask.shape[1] == 1 and bool(((~is_visible).sum(-1) == hidden).all())
        found = (hidden + begin).to(torch.int32).expand(rows).contiguous() if hides_first_only else None
        mask.first_visible_slots = found
    return found


def supports_packed_attention(model: nn.Module) -> bool:
    """Return True if the model calls sdpa or this implementation through transformers' table of attentions."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in (_FALLBACK, ATTENTION):
        return False
    modules = attention_modules(model)
    return bool(modules) and all(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in modules.values()
    )


def attach_attention(model: Any) -> bool:
    """Set the model's attention to this implementation; return False where the model does not support it."""
    if not supports_packed_attention(model):
        return False
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    return True


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[_FALLBACK])
