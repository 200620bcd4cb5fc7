"""The quantized embedding of patches: a convolution whose stride is its kernel's size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.runtime.modules.linear import QuantLinear


class QuantPatches(QuantLinear):
    """The product of every patch of a picture with one packed matrix (out, channels * height * width).

    `weight` is an empty buffer with the type and device of the former weight, which models read.

    Attributes:
        in_channels: of pictures.
        patch: height and width of a patch.
    """

    def __init__(self, format: Format, old: nn.Conv2d, device: Any = None) -> None:
        """Allocate an empty layer in place of a convolution."""
        height, width = old.kernel_size[0], old.kernel_size[1]
        columns = old.in_channels * height * width
        super().__init__(format, (old.out_channels, columns), old.bias is not None, device)
        self.in_channels, self.patch = old.in_channels, (height, width)
        self._buffers["weight"] = old.weight.data.new_empty(
            old.out_channels, 0
        )  # a name that is taken by the base
        self._non_persistent_buffers_set.add("weight")

    @property
    def weight(self) -> Tensor:
        """The empty buffer."""
        found = self._buffers["weight"]
        assert found is not None
        return found

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._buffers["weight"] = value

    def forward(self, x: Tensor) -> Tensor:
        """Embed pictures (pictures, channels, height, width) as (pictures, out, rows, columns) of patches."""
        height, width = self.patch
        rows, columns = x.shape[-2] // height, x.shape[-1] // width
        whole = x[..., : rows * height, : columns * width]
        split = whole.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
        patches = split.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return super().forward(patches).movedim(-1, 1)

    def float_module(self) -> tuple[nn.Module, tuple[int, ...]]:
        """Return a convolution without weights, and the shape of its weight."""
        shape = (self.out_features, self.in_channels, *self.patch)
        return nn.Conv2d(self.in_channels, self.out_features, self.patch, self.patch, device="meta"), shape


def replace_patches(model: nn.Module, name: str, format: Format, device: Any = None) -> QuantPatches:
    """Replace a convolution by an empty QuantPatches.

    Args:
        model: The model, changed in place.
        name: Path of the convolution, for which `embeds_patches` holds.
        format: Format of the matrix.
        device: Device of the packed tensors.

    Returns:
        The new layer.
    """
    old = model.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    new = QuantPatches(format, old, device)
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, new)
    return new
