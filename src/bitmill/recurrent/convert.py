"""Weights of torch.nn.LSTM and torch.nn.GRU, and of Keras, as those of recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.recurrent.layer import RecurrentLayer


@torch.no_grad()
def load_layers(layers: nn.ModuleList, module: nn.LSTM | nn.GRU) -> None:
    """Copy the weights of torch.nn.LSTM or torch.nn.GRU, of one direction, into recurrent layers.

    Args:
        layers: as many layers, of equal sizes.
        module: the module of torch.
    """
    for index, layer in enumerate(layers):
        assert isinstance(layer, RecurrentLayer)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        tensors: dict[str, Any] = {name: getattr(module, f"{name}_l{index}", None) for name in names}
        load_layer(layer, **tensors)
        if layer.projection is not None:
            layer.projection.weight.copy_(getattr(module, f"weight_hr_l{index}"))


@torch.no_grad()
def load_layer(
    layer: RecurrentLayer,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> None:
    """Copy matrices, in which the rows of all gates follow each other, into a layer.

    Args:
        layer: the layer.
        weight_ih, weight_hh: (gates * hidden, in) and (gates * hidden, out).
        bias_ih, bias_hh: (gates * hidden,); None for zeros.
    """
    zeros = weight_ih.new_zeros(weight_ih.shape[0])
    biases = [(zeros if bias is None else bias).chunk(len(layer.gates)) for bias in (bias_ih, bias_hh)]
    matrices = [weight.chunk(len(layer.gates)) for weight in (weight_ih, weight_hh)]
    for gate, W, U, b, d in zip(layer.gates, *matrices, *biases):
        inputs, hidden = layer.input_hidden[gate], layer.hidden_hidden[gate]
        assert isinstance(inputs, nn.Linear)
        assert isinstance(hidden, nn.Linear)
        inputs.weight.copy_(W)
        hidden.weight.copy_(U)
        inputs.bias.copy_(b if hidden.bias is not None else b + d)
        if hidden.bias is not None:
            hidden.bias.copy_(d)
