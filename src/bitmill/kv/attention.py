"""Attention that reads packed keys and values, as an attention implementation of transformers.

A model keeps its own implementation for everything else: this one takes over where a packed layer passes itself on
in the place of its keys (QuantizedLayer.update).
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
from bitmill.kv.rope import attentions
from bitmill.kv.scheme import ATTENTION

_STANDS_FOR = "sdpa"
_UNKNOWN = ("position_bias", "softcap")  # what else may go into a score


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """(rows, heads, 1, dim) queries on a packed layer; anything else goes to sdpa. Gives (rows, 1, heads, dim)."""
    theirs: Any = ALL_ATTENTION_FUNCTIONS[_STANDS_FOR]
    layer: QuantizedLayer | None = getattr(key, "packed_layer", None)
    if layer is None:
        if not key.shape[-2]:
            raise UsageError(
                f"{type(module).__name__} changes keys after they were cached; use attention 'sdpa' for it."
            )
        answer: tuple[Tensor, Tensor | None] = theirs(module, query, key, value, attention_mask, **kwargs)
        return answer
    first = first_in_sight(layer, attention_mask)
    if first is None or any(kwargs.get(name) is not None for name in _UNKNOWN):
        keys, values = layer.floats(layer.first_for(1))
        answer = theirs(module, query, keys, values, attention_mask, **kwargs)
        return answer
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return layer.attend(query[:, :, 0], scaling, first)[:, None].to(query.dtype), None


def first_in_sight(layer: QuantizedLayer, mask: Any) -> Tensor | None:
    """For every row the slot of the first token that the last one may look at, (rows,) int32.

    Padding and windows both hide the first tokens and no others. None for a mask that hides others.
    """
    rows, begin = layer.pages.rows, layer.first_for(1)
    if mask is None:
        return torch.full((rows,), begin, dtype=torch.int32, device=layer.device)
    found: Tensor | str | None = getattr(mask, "first_in_sight", "unknown")  # all layers of a kind share a mask
    if isinstance(found, str):
        seen = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2
        hidden = seen.to(torch.int32).argmax(-1)
        is_plain = mask.shape[1] == 1 and bool(((~seen).sum(-1) == hidden).all())
        found = (hidden + begin).to(torch.int32).expand(rows).contiguous() if is_plain else None
        mask.first_in_sight = found
    return found


def takes_packed(model: nn.Module) -> bool:
    """Whether the model's attention goes through transformers' table of implementations, as sdpa or this one."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in (_STANDS_FOR, ATTENTION):
        return False
    found = attentions(model)
    return bool(found) and all(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in found.values()
    )


def attach(model: Any) -> bool:
    """Let the model's attention read packed layers; whether it can."""
    if not takes_packed(model):
        return False
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    return True


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[_STANDS_FOR])
