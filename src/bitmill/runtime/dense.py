"""Unpack a quantized model into an ordinary one: the same function, the memory of a float model."""

from __future__ import annotations

import torch
from torch import nn

from bitmill.quantized import SHARED, unpack
from bitmill.runtime.linear import QuantLinear

_TRACES = ("hf_quantizer", "quantization_method", "is_quantized")  # by which transformers refuses training


def densify(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give every QuantLinear's place to what was there before, with the decoded weight; returns the model."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]:
        linear = _plain(layer)
        decoded = unpack(layer.format, layer.packed(), layer.shape).dequantize().to(dtype)
        weight = decoded.T.contiguous() if layer.was_conv1d else decoded
        bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        linear.register_parameter("bias", bias)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, linear)
    model._modules.pop(SHARED, None)  # nobody looks there any more
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):  # or a saved copy would claim to be packed
        del config.quantization_config
    for trace in _TRACES:
        if hasattr(model, trace):
            delattr(model, trace)
    return model


def _plain(layer: QuantLinear) -> nn.Module:
    """A float layer of the kind that a packed one replaced, still without weights."""
    if not layer.was_conv1d:
        return nn.Linear(layer.in_features, layer.out_features, device="meta")
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features)
