"""Unpack a quantized model into an ordinary one: the same function, the memory of a float model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitmill.formats.quantized import SHARED, unpack
from bitmill.runtime.modules.embedding import QuantEmbedding, restore_embedding
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.packed import PackedMatrix

_TRACES = ("hf_quantizer", "quantization_method", "is_quantized")  # by which transformers refuses training


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give every packed layer's place to what was there before, with the decoded weight; returns the model.

    What was tied stays tied.
    """
    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedMatrix)]
    packed.sort(key=lambda named: isinstance(named[1], QuantLinear))  # a head may be tied to a table
    for name, layer in packed:
        if isinstance(layer, QuantEmbedding):
            restore_embedding(layer, _decoded(layer, dtype))
            continue
        assert isinstance(layer, QuantLinear)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        linear = _plain(layer)
        linear.register_parameter("weight", _weight(layer, dtype))
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


def _decoded(layer: PackedMatrix, dtype: torch.dtype) -> Tensor:
    return unpack(layer.format, layer.packed(), layer.shape).dequantize().to(dtype).contiguous()


def _weight(layer: QuantLinear, dtype: torch.dtype) -> nn.Parameter:
    """The decoded weight as the float layer keeps it; where it is tied, that of the table, which is decoded."""
    if layer.tied is not None:
        weight = layer.tied.weight
        assert isinstance(weight, nn.Parameter)
        return weight
    decoded = _decoded(layer, dtype)
    return nn.Parameter(decoded.T.contiguous() if layer.was_conv1d else decoded, requires_grad=False)


def _plain(layer: QuantLinear) -> nn.Module:
    """A float layer of the kind that a packed one replaced, still without weights."""
    if not layer.was_conv1d:
        return nn.Linear(layer.in_features, layer.out_features, device="meta")
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features)
