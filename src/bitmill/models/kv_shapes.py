"""What each layer of a model keeps of the past, from its config alone."""

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
    """Keys and values of one layer: `heads` heads of `dim` numbers, of the last `window` tokens or of all."""

    heads: int
    dim: int
    window: int | None = None

    def num_elements(self, tokens: int) -> int:
        """How many numbers an ordinary cache keeps after `tokens` tokens of a row.

        In a window the next token looks at itself and at window - 1 before it.
        """
        seen = tokens if self.window is None else min(tokens, max(self.window - 1, 1))
        return 2 * self.heads * self.dim * seen


def cached_layers(config: Any, name: str = "The model") -> tuple[CachedLayer, ...]:
    """The layers, in order, as transformers would cache them; layers that read another one's cache are left out.

    Raises SourceError for encoders, alone or beside a decoder, for layers that keep a state instead of tokens, and
    for compressed keys.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    task = task_for(config)
    if not task.generates:
        raise SourceError(f"{name} is {task.description}, which keeps no keys and values; give a language model.")
    if config.is_encoder_decoder:
        raise SourceError(
            f"{name} has an encoder beside its decoder, which cannot be planned yet; give a decoder."
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise SourceError(
            f"{name} keeps keys and values compressed (kv_lora_rank is {text.kv_lora_rank}), which cannot be "
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
    """Raises SourceError where a k_proj of the model makes other keys than the config says."""
    for path, module in model.named_modules():
        found = re.search(r"\.(\d+)\..*k_proj$", path)
        width = getattr(module, "out_features", None)
        if found is None or width is None or int(found[1]) >= len(layers):
            continue
        layer = layers[int(found[1])]
        if width != layer.heads * layer.dim:
            raise SourceError(
                f"{path} of {name} makes keys of {width} numbers, and {layer.heads} heads of {layer.dim} were "
                "expected; heads that differ between layers cannot be planned yet."
            )


def kv_heads_and_dim(config: Any, name: str) -> tuple[int, int]:
    """Heads of keys, numbers of a head. Raises SourceError where the config does not say."""
    queries = getattr(config, "num_attention_heads", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or queries
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    hidden = getattr(config, "hidden_size", None)
    dim = getattr(config, "head_dim", None) or (hidden // queries if hidden and queries else None)
    if not isinstance(heads, int) or not isinstance(dim, int):
        raise SourceError(
            f"The config of {name} names no attention heads (num_attention_heads); give a decoder's."
        )
    return heads, dim
