"""Shapes of the keys and values that each layer of a model caches, from its config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitmill.errors import SourceError
from bitmill.tasks.base import task_for

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class CachedLayer:
    """Keys and values of one layer.

    heads: key-value heads.
    dim: elements of a head.
    window: tokens of a sliding window; None where all tokens are cached.
    """

    heads: int
    dim: int
    window: int | None = None

    def num_elements(self, tokens: int) -> int:
        """Return the elements that an ordinary cache holds after `tokens` tokens of a row.

        In a sliding window the next token attends to itself and to the window - 1 tokens before it.
        """
        cached = tokens if self.window is None else min(tokens, max(self.window - 1, 1))
        return 2 * self.heads * self.dim * cached


def cached_layers(config: Any, name: str = "The model") -> tuple[CachedLayer, ...]:
    """Return the layers in order as transformers caches them.

    Layers that read the cache of another layer are left out.

    Args:
        config: transformers config.
        name: name of the model for messages.

    Raises:
        SourceError: The model is an encoder or has one, layers keep a state instead of tokens, or keys and values
            are cached in compressed form.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    task = task_for(config)
    if config.is_encoder_decoder:
        raise SourceError(
            f"{name} has an encoder and a decoder, which cannot be planned yet; give a decoder-only model."
        )
    if not task.generates:
        raise SourceError(f"{name} is {task.description}, which keeps no keys and values; give a language model.")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise SourceError(
            f"{name} caches compressed keys and values (kv_lora_rank is {text.kv_lora_rank}), which cannot be "
            "planned yet; give a model with plain, grouped or multi-query attention."
        )
    heads, dim = kv_heads_and_dim(text, name)
    layers = []
    for index, layer in enumerate(DynamicCache(config=text).layers):
        kind = type(layer).__name__
        if kind.startswith("Dummy"):
            continue
        if not isinstance(layer, DynamicLayer) or "Linear" in kind:
            raise SourceError(
                f"Layer {index} of {name} keeps a state instead of tokens ({kind}), which cannot be planned yet; "
                "give a model whose layers are all attention."
            )
        layers.append(CachedLayer(heads, dim, getattr(layer, "sliding_window", None)))
    return tuple(layers)


def check_key_widths(layers: tuple[CachedLayer, ...], model: nn.Module, name: str) -> None:
    """Raise SourceError where a k_proj of the model has another width than the config implies.

    Args:
        layers: shapes from the config.
        model: the model; parameters may be on the meta device.
        name: its name for the message.
    """
    for path, module in model.named_modules():
        found = re.search(r"\.(\d+)\..*k_proj$", path)
        width = getattr(module, "out_features", None)
        if found is None or width is None or int(found[1]) >= len(layers):
            continue
        layer = layers[int(found[1])]
        if width != layer.heads * layer.dim:
            raise SourceError(
                f"{path} of {name} has {width} outputs, and {layer.heads} heads of {layer.dim} were "
                "expected; heads that differ between layers cannot be planned yet."
            )


def kv_heads_and_dim(config: Any, name: str) -> tuple[int, int]:
    """Return the number of key-value heads and the elements of a head.

    Args:
        config: transformers config of a decoder.
        name: name of the model for messages.

    Raises:
        SourceError: The config lacks them, or they differ between layers.
    """
    queries = getattr(config, "num_attention_heads", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or queries
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    hidden = getattr(config, "hidden_size", None)
    try:
        dim = getattr(config, "head_dim", None) or (hidden // queries if hidden and queries else None)
    except RuntimeError:  # of transformers, for a config with values of every layer, such as Gemma 4's
        raise SourceError(
            f"The heads of {name} differ between layers (head_dim), so its keys and values can be neither "
            "packed nor planned yet; leave out --kv."
        ) from None
    if not isinstance(heads, int) or not isinstance(dim, int):
        raise SourceError(
            f"The config of {name} names no attention heads (num_attention_heads), so there are no keys and "
            "values; give a transformer that writes text."
        )
    return heads, dim
