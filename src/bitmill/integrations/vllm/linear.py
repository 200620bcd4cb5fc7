"""Packed linear layers in vLLM, those that it fuses among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.integrations.vllm.packed_weights import PackedWeights, Rank
from bitmill.integrations.vllm.products import number_of, product


class PackedLinearMethod(LinearMethodBase):
    """Loads and runs the matrices of one layer of vLLM.

    Attributes:
        formats: of each stored matrix; None for one in float.
    """

    def __init__(self, formats: list[Format | None]) -> None:
        self.formats = formats

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register where the stored tensors of a layer are collected; see vLLM's `LinearMethodBase`.

        Raises:
            CheckpointError: several ranks would have to divide a matrix that the folder stores fused.
        """
        name, sizes, ranks = layer.prefix, output_partition_sizes, getattr(layer, "tp_size", 1)
        if len(sizes) != len(self.formats):
            if ranks > 1:
                raise CheckpointError(f"{name!r} is stored as one matrix, which {ranks} ranks cannot divide.")
            sizes = [sum(sizes)]
        layer.packed_weights = PackedWeights(name, self.formats)
        layer.packed_rank = Rank(getattr(layer, "tp_rank", 0), sizes, input_size_per_partition)
        layer.packed_weights.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what was read for the kernels."""
        device = torch.empty(0).device
        layer.packed = nn.ModuleList(layer.packed_weights.build(layer, layer.packed_rank.cut, device))
        layer.packed_number, layer.packed_width = number_of(layer.packed), sum(layer.packed_rank.rows)
        del layer.packed_weights

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x (..., in) to (..., out)."""
        y = product(x, layer.packed_number, layer.packed_width)
        return y if bias is None else y + bias
