"""Replace the packed layers of a model by float ones with the decoded weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.architectures.experts import join_experts
from bitmill.architectures.inputs import hook_inputs
from bitmill.formats.quantized import SHARED, Quantized, row_slices, unpack
from bitmill.runtime.modules.embedding import QuantEmbedding, restore_embedding
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.packed import PackedMatrix

# with these transformers refuses training, and keeps the names of packed parts when it saves
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions")


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace every packed layer by a float layer of its former class with the decoded weight.

    Tied layers stay tied. Inputs that are quantized are rounded before the float layers multiply them; files that
    such a model saves do not say so.

    Args:
        model: The model, changed in place.
        dtype: Type of the weights.

    Returns:
        The model.
    """
    tables = [module for module in model.modules() if isinstance(module, QuantEmbedding)]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    weights: dict[PackedMatrix, nn.Parameter] = {}  # of tables, to which heads may be tied
    for table in tables:
        restored: Any = restore_embedding(model, table, _decoded(table, _unpacked(table), dtype))
        weights[table] = restored.weight
    for name, layer in linears.items():
        matrix = _unpacked(layer) if layer.format.quantizes_inputs or layer.tied is None else None
        linear, shape = layer.float_module()
        if layer.tied is not None:
            weight = weights[layer.tied]
        else:
            assert matrix is not None
            weight = _weight(layer, matrix, dtype)
        if weight.shape != shape:
            weight = nn.Parameter(weight.data.view(shape), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        linear.register_parameter("weight", weight)
        linear.register_parameter("bias", bias)
        if matrix is not None:
            hook_inputs(linear, matrix.rounding)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, linear)
    join_experts(model)
    model._modules.pop(SHARED, None)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):  # a saved copy is no packed model
        del config.quantization_config
    for mark in _MARKS:
        if hasattr(model, mark):
            delattr(model, mark)
    return model


def dequantized_bytes(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes that the weights of `dequantize_model` take; tied layers have one."""
    packed = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    own = [module for module in packed if getattr(module, "tied", None) is None]
    return sum(math.prod(module.shape) for module in own) * dtype.itemsize


def _decoded(layer: PackedMatrix, quantized: Quantized, dtype: torch.dtype) -> Tensor:
    if not layer.outside_blocks:
        return quantized.dequantize().to(dtype).contiguous()
    W = torch.empty(layer.shape, dtype=dtype, device=quantized.codes.device)  # a large one, filled in slices
    sizes = row_slices(layer.shape)
    for piece, rows in zip(quantized.split(sizes), W.split(sizes)):
        rows.copy_(piece.dequantize())
    return W


def _unpacked(layer: PackedMatrix) -> Quantized:
    return unpack(layer.format, layer.packed(), layer.shape)


def _weight(layer: QuantLinear, matrix: Quantized, dtype: torch.dtype) -> nn.Parameter:
    """Return the decoded weight in the orientation of the float layer."""
    decoded = _decoded(layer, matrix, dtype)
    return nn.Parameter(decoded.T.contiguous() if layer.was_conv1d else decoded, requires_grad=False)
