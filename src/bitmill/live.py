"""Quantize a live module in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitmill.models.skeleton import Skeleton
from bitmill.pipeline import BlockResult
from bitmill.runtime import swap_linear


class ModuleSink:
    """Puts QuantLinear layers into a live module as blocks finish."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[dict[str, Any]] = []

    def finished(self, index: int) -> BlockResult | None:
        """Nothing is kept between runs."""
        return None

    def write(self, result: BlockResult, skeleton: Skeleton) -> None:
        """Replace the block's linears, and what a transform changed."""
        for name, layer in result.layers.items():
            old = self.model.get_submodule(name)
            bias = getattr(old, "bias", None)
            device = device_of(old)
            new = swap_linear(self.model, name, layer.quantized.format)
            for part, tensor in layer.quantized.pack().items():
                new._buffers[part] = tensor.to(device)
            new.bias = bias
            self.layers.append({"name": name, **layer.summary()})
        for name, tensor in result.changed.items():
            parameter = self.model.get_parameter(name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters lie."""
    return next(module.parameters()).device
