"""Unpack a quantized model into an ordinary one: the same function, the memory of a float model."""

from __future__ import annotations

import torch
from torch import nn

from bitmill.quantized import unpack
from bitmill.runtime.embedding import QuantEmbedding, restore_embedding
from bitmill.runtime.linear import QuantLinear
from bitmill.runtime.packed import Packed


def densify(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give every packed layer its decoded weight as an ordinary one, in place; returns the model.

    What was tied stays tied.
    """
    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Packed)]
    packed.sort(key=lambda named: isinstance(named[1], QuantLinear))  # a head may be tied to a table
    for name, layer in packed:
        if isinstance(layer, QuantEmbedding):
            restore_embedding(layer, _decoded(layer, dtype))
            continue
        assert isinstance(layer, QuantLinear)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        if layer.tied is None:
            linear.weight = nn.Parameter(_decoded(layer, dtype), requires_grad=False)
        else:
            linear.weight = layer.tied.weight  # type: ignore[assignment]
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, linear)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):  # or a saved copy would claim to be packed
        del config.quantization_config
    for trace in (
        "hf_quantizer",
        "quantization_method",
        "is_quantized",
    ):  # by which transformers refuses training and saving
        if hasattr(model, trace):
            delattr(model, trace)
    return model


def _decoded(layer: Packed, dtype: torch.dtype) -> torch.Tensor:
    return unpack(layer.format, layer.packed(), layer.shape).dequantize().to(dtype)
