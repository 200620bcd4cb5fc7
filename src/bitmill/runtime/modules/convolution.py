"""The quantized convolution: every patch of a picture times one packed matrix (out, channels * height * width)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from bitmill.formats import Format
from bitmill.runtime.modules.linear import QuantLinear


@dataclass(frozen=True)
class Unfolding:
    """How a convolution cuts pictures into patches, which its weights are multiplied with.

    kernel, stride, dilation: (height, width) each.
    sides: pixels that are added left, right, above and below.
    mode: of these pixels, as of `torch.nn.functional.pad`.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Unfolding:
        """Return that of a convolution for which `unfolds` holds."""
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        kernel, stride, dilation = ((a, b) for a, b in (conv.kernel_size, conv.stride, conv.dilation))
        return cls(kernel, stride, dilation, tuple(conv._reversed_padding_repeated_twice), mode)

    def patches(self, x: Tensor) -> Tensor:
        """Return the patches (pictures, patches, columns) of pictures (pictures, channels, height, width)."""
        padded = pad(x, self.sides, self.mode) if any(self.sides) else x
        return unfold(padded, self.kernel, self.dilation, 0, self.stride).mT

    def pictures(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Return outputs of patches (pictures, patches, out) as (pictures, out, height, width).

        Args:
            y: the outputs.
            size: height and width of the pictures that were cut.
        """
        added = (self.sides[2] + self.sides[3], self.sides[0] + self.sides[1])
        shape = [
            (size[k] + added[k] - self.dilation[k] * (self.kernel[k] - 1) - 1) // self.stride[k] + 1
            for k in (0, 1)
        ]
        return y.mT.unflatten(-1, shape)


def unfolds(module: nn.Module) -> bool:
    """Return True for a convolution of pictures that one matrix computes, without groups of channels."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and not module.transposed


class QuantConv2d(QuantLinear):
    """A convolution of pictures whose weights are packed in any format; it runs through the kernels of matrices.

    Attributes:
        in_channels: of pictures.
        unfolding: how they are cut into patches.
    """

    def __init__(
        self,
        format: Format,
        in_channels: int,
        out_channels: int,
        unfolding: Unfolding,
        bias: bool,
        device: Any = None,
    ) -> None:
        """Allocate an empty layer."""
        height, width = unfolding.kernel
        super().__init__(format, (out_channels, in_channels * height * width), bias, device)
        self.in_channels, self.unfolding = in_channels, unfolding

    def forward(self, x: Tensor) -> Tensor:
        """Compute pictures (pictures, channels, height, width) to (pictures, out, height, width)."""
        y = super().forward(self.unfolding.patches(x).contiguous())
        return self.unfolding.pictures(y, (x.shape[-2], x.shape[-1]))

    def float_module(self) -> tuple[nn.Module, tuple[int, ...]]:
        """Return a convolution without weights, and the shape of its weight."""
        cut = self.unfolding
        mode: Any = "zeros" if cut.mode == "constant" else cut.mode
        conv = nn.Conv2d(
            self.in_channels,
            self.out_features,
            cut.kernel,
            cut.stride,
            (cut.sides[2], cut.sides[0]),
            cut.dilation,
            padding_mode=mode,
            device="meta",
        )
        conv._reversed_padding_repeated_twice = list(cut.sides)
        return conv, (self.out_features, self.in_channels, *cut.kernel)
