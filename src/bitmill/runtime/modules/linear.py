"""The quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.runtime import ops
from bitmill.runtime.kernels import Kernel
from bitmill.runtime.modules.packed import PackedMatrix, PackedModule


class QuantLinear(PackedMatrix):
    """y = x W^T + b with W kept packed, for any format.

    tied: the layer whose matrix this one reads, by that layer's kernel; it keeps none of its own then.
    """

    tied: PackedMatrix | None
    was_conv1d = False  # it took the place of a layer of GPT-2's kind, which keeps its weight as (in, out)

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        bias: bool,
        device: Any = None,
        tied: PackedMatrix | None = None,
        shared: PackedModule | None = None,
    ) -> None:
        own = format.own_layout(shape) if shared else format.layout(shape)
        super().__init__({} if tied else own, device)
        self.format, self.shape, self._text = format, shape, ops.text_of(format)
        self.out_features, self.in_features = shape
        object.__setattr__(self, "tied", tied)  # neither is a part of this module: both belong to the model
        object.__setattr__(self, "shared", shared)
        self.bias = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False) if bias else None

    def packed(self) -> dict[str, Tensor]:
        """All packed tensors by name, those that are not its own too."""
        return super().packed() if self.tied is None else self.tied.packed()

    def kernel_on(self, device: torch.device) -> Kernel:
        """Its own, or that of the layer it is tied to."""
        return super().kernel_on(device) if self.tied is None else self.tied.kernel_on(device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x."""
        y = self.kernel_on(x.device).apply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.format!r}, bias={self.bias is not None}"


def replace_linear(
    model: nn.Module,
    name: str,
    format: Format,
    device: Any = None,
    tied: PackedMatrix | None = None,
    shared: PackedModule | None = None,
) -> QuantLinear:
    """Replace the linear (nn.Linear or GPT-2's Conv1D) called `name` by an empty QuantLinear and return it."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        shape = (old.out_features, old.in_features)
    else:  # Conv1D keeps (in, out)
        assert isinstance(old.weight, Tensor)
        shape = (old.weight.shape[1], old.weight.shape[0])
    new = QuantLinear(format, shape, getattr(old, "bias", None) is not None, device, tied, shared)
    new.was_conv1d = not isinstance(old, nn.Linear)
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, new)
    return new
