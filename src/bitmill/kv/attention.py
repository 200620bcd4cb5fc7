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

from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.rope import attentions

NAME = "bitmill"
_STANDS_FOR = "sdpa"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """(rows, heads, 1, dim) queries on a packed layer; anything else goes to sdpa. Gives (rows, 1, heads, dim)."""
    layer = getattr(key, "packed_layer", None)
    if layer is None:
        theirs: Any = ALL_ATTENTION_FUNCTIONS[_STANDS_FOR]
        answer: tuple[Tensor, Tensor | None] = theirs(module, query, key, value, attention_mask, **kwargs)
        return answer
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = layer.attend(query[:, :, 0], scaling, first_in_sight(layer, attention_mask))
    return out[:, None].to(query.dtype), None


def first_in_sight(layer: QuantizedLayer, mask: Tensor | None) -> Tensor:
    """For every row the slot of the first token that the last one may look at, (rows,).

    Padding and windows both hide the first tokens and no others, so that this is all a mask says.
    """
    rows, first = layer.pages.rows, layer.in_sight(1)
    if mask is None:
        return torch.full((rows,), first, dtype=torch.int64, device=layer.device)
    seen = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2
    begins = layer.length - seen.shape[-1]
    return (begins + seen.to(torch.int64).argmax(-1)).expand(rows)


def takes_packed(model: nn.Module) -> bool:
    """Whether the model's attention goes through transformers' table of implementations, as sdpa or this one."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in (_STANDS_FOR, NAME):
        return False
    found = attentions(model)
    return bool(found) and all(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in found
    )


def attach(model: Any) -> bool:
    """Let the model's attention read packed layers; whether it can."""
    if not takes_packed(model):
        return False
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    return True


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_STANDS_FOR])
