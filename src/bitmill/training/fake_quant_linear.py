"""A linear layer for quantization-aware training: float weights that are rounded whenever they are used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitmill.formats.quantized import Quantized
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.tuners.learned_matrix import LearnedMatrix


class FakeQuantLinear(LearnedMatrix):
    """y = x W^T + b with W rounded to its format; weights, scales and zeros are trained.

    In evaluation mode without gradients it computes with the packed layer that `quant_linear` returns, so that its
    outputs are those of the written folder.

    Args:
        linear: an nn.Linear, an nn.Conv2d, or GPT-2's Conv1D, which stores its weight as (in, out).
        start: its matrix in its format.
    """

    def __init__(self, linear: nn.Module, start: Quantized) -> None:
        super().__init__(weight_of(linear), start)
        self.was_conv1d = not isinstance(linear, nn.Linear | nn.Conv2d)
        self.out_features, self.in_features = self.shape
        self.bias: nn.Parameter | None
        self.register_parameter("bias", getattr(linear, "bias", None))
        self._packed: tuple[tuple[tuple[int, int], ...], QuantLinear] | None = None
        self.train(linear.training)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Compute x (..., in) to (..., out), in the type of x."""
        if x is None:
            return super().forward()
        if self.evaluates:
            packed: Tensor = self._evaluated()(x)
            return packed
        if self.format.quantizes_inputs:
            x = self._rounded_inputs(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, super().forward().to(x.dtype), bias)

    def _rounded_inputs(self, x: Tensor) -> Tensor:
        """Return rounded inputs, with gradients of their scale too where it is a number from calibration."""
        format = self.format
        if isinstance(format, QuantizedInputs) and format.learned_inputs:
            return format.fake_quantize_inputs(x, self.params())
        with torch.no_grad():
            rounded = format.effective_inputs(x, self.params())
        return x + (rounded - x).detach()

    @property
    def evaluates(self) -> bool:
        """True where the packed layer computes."""
        return not self.training and not torch.is_grad_enabled()

    @torch.no_grad()
    def quant_linear(self) -> QuantLinear:
        """Return the packed layer of the present state."""
        layer = QuantLinear(self.format, self.shape, self.bias is not None, device="meta")
        layer.set_packed(self.quantized().pack())
        layer.bias, layer.was_conv1d = self.bias, self.was_conv1d
        return layer

    def _evaluated(self) -> QuantLinear:
        """Return the packed layer, packed again where a parameter has changed."""
        tensors = (*self.parameters(), *self.buffers())
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._packed is None or self._packed[0] != state:
            self._packed = state, self.quant_linear()
        return self._packed[1]

    def train(self, mode: bool = True) -> FakeQuantLinear:
        """Set the mode, and drop what was packed for evaluation."""
        self._packed = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Return the description in print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.format!r}, bias={self.bias is not None}"


def weight_of(linear: nn.Module) -> Tensor:
    """Return the weight of an nn.Linear, an nn.Conv2d or GPT-2's Conv1D as fp32 (out, in)."""
    assert isinstance(linear.weight, Tensor)
    if isinstance(linear, nn.Conv2d):
        weight = linear.weight.flatten(1)
    else:
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
    return weight.detach().float().contiguous()


def fake_quant_layers(model: nn.Module) -> Iterator[tuple[str, FakeQuantLinear]]:
    """Yield the layers of a model that are trained with rounded weights, by path."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            yield name, module
