"""Packed tables of token embeddings in vLLM, and heads that are tied to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from bitmill.formats import Format
from bitmill.integrations.vllm.packed_weights import PackedWeights
from bitmill.integrations.vllm.products import number_of, product, rows


class PackedEmbeddingMethod(QuantizeMethodBase):
    """Loads and runs a table of embeddings, or a head.

    Attributes:
        format: of the table.
    """

    def __init__(self, format: Format) -> None:
        self.format = format

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Register where the stored tensors are collected; see vLLM's `QuantizeMethodBase`."""
        layer.packed_weights = PackedWeights(layer.prefix, [self.format])
        object.__setattr__(layer, "packed_table", layer)  # no submodule of itself
        layer.packed_weights.register(layer)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head multiply with the table of embeddings."""
        for name in [name for name, _ in layer.named_parameters(recurse=False)]:
            delattr(layer, name)
        del layer.packed_weights
        object.__setattr__(layer, "packed_table", embed_tokens)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the rows of this rank for the kernels."""
        if layer.packed_table is not layer:
            return
        held = layer.shard_indices
        cut = slice(held.org_vocab_start_index, held.org_vocab_end_index), slice(0, layer.embedding_dim)
        modules = layer.packed_weights.build(layer, lambda part, shape: cut, torch.empty(0).device)
        layer.packed = nn.ModuleList(modules)
        layer.packed_number, layer.packed_rows = number_of(layer.packed), cut[0].stop - cut[0].start
        layer.packed_like = torch.empty(0, dtype=layer.params_dtype)
        del layer.packed_weights

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Look up token ids (tokens,) as rows (tokens, width)."""
        return rows(input_, layer.packed_number, layer.embedding_dim, layer.packed_like)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute hidden states (tokens, width) to logits (tokens, words of this rank and its padding)."""
        table = layer.packed_table
        y = product(x, table.packed_number, table.packed_rows)
        y = nn.functional.pad(y, (0, table.num_embeddings_per_partition - table.packed_rows))
        return y if bias is None else y + bias
