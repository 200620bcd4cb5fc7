"""A convolution for quantization-aware training: float weights that are rounded whenever they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitmill.formats.quantized import Quantized
from bitmill.runtime.modules.convolution import QuantConv2d, Unfolding
from bitmill.training.fake_quant_linear import FakeQuantLinear


class FakeQuantConv2d(FakeQuantLinear):
    """A convolution as the product of patches with one matrix, which is trained as that of `FakeQuantLinear`.

    Args:
        conv: an nn.Conv2d without groups.
        start: its matrix (out, channels * height * width) in its format.
    """

    def __init__(self, conv: nn.Conv2d, start: Quantized) -> None:
        super().__init__(conv, start)
        self.in_channels, self.unfolding = conv.in_channels, Unfolding.of(conv)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Compute pictures (pictures, channels, height, width) to (pictures, out, height, width)."""
        if x is None or self.evaluates:
            return super().forward(x)
        y = super().forward(self.unfolding.patches(x))
        return self.unfolding.pictures(y, (x.shape[-2], x.shape[-1]))

    @torch.no_grad()
    def quant_linear(self) -> QuantConv2d:
        """Return the packed layer of the present state."""
        bias = self.bias is not None
        layer = QuantConv2d(self.format, self.in_channels, self.out_features, self.unfolding, bias, device="meta")
        layer.set_packed(self.quantized().pack())
        layer.bias = self.bias
        return layer
