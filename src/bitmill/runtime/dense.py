"""Unpack a quantized model into an ordinary one: the same function, the memory of a float model."""

from __future__ import annotations

import torch
from torch import nn

from bitmill.quantized import SHARED, unpack
from bitmill.runtime.linear import QuantLinear


def densify(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace every QuantLinear by an nn.Linear with its decoded weight, in place; returns the model."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        decoded = unpack(layer.format, layer.packed(), layer.shape).dequantize()
        linear.weight = nn.Parameter(decoded.to(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, linear)
    model._modules.pop(SHARED, None)  # nobody looks there any more
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
