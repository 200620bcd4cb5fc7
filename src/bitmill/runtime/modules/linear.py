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
    """y = x W^T + b with W packed in any format.

    Attributes:
        tied: The layer whose matrix and kernel this one uses; it then has no matrix of its own.
        was_conv1d: True if it replaced GPT-2's Conv1D, which stores its weight as (in, out).
    """

    tied: PackedMatrix | None
    was_conv1d = False

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        bias: bool,
        device: Any = None,
        tied: PackedMatrix | None = None,
        shared: PackedModule | None = None,
    ) -> None:
        """Allocate an empty layer.

        Args:
            format: Format of the weight.
            shape: (out, in).
            bias: Add a bias.
            device: Device of the tensors.
            tied: The layer whose matrix to use.
            shared: The module with the parts that the format shares between layers.
        """
        own = format.own_layout(shape) if shared else format.layout(shape)
        super().__init__({} if tied else own, device)
        self.format, self.shape, self._format_json = format, shape, ops.format_to_json(format)
        self.out_features, self.in_features = shape
        object.__setattr__(self, "tied", tied)  # not registered as submodules: both belong to the model
        object.__setattr__(self, "shared", shared)
        self.bias = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False) if bias else None

    @property
    def weight(self) -> Tensor:
        """An int8 tensor (out, in) of one number, for code that looks at the type or the device of a weight.

        T5 looks at the type, and PEFT at the device.
        """
        device = next((tensor.device for tensor in self._buffers.values() if tensor is not None), None)
        found = torch.zeros((), dtype=torch.int8, device=device).expand(self.shape)
        found._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws no values for it
        return found

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Ignore a weight: transformers ties heads by assigning that of the embedding."""

    def packed(self) -> dict[str, Tensor]:
        """Return all packed tensors by name, tied and shared ones included."""
        return super().packed() if self.tied is None else self.tied.packed()

    def kernel_on(self, device: torch.device) -> Kernel:
        """Return the kernel of the layer, or of the layer it is tied to."""
        return super().kernel_on(device) if self.tied is None else self.tied.kernel_on(device)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (..., in) to (..., out), in the type of x."""
        y = self.kernel_on(x.device).apply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def float_module(self) -> tuple[nn.Module, tuple[int, ...]]:
        """Return a layer of the class that this one replaced, without weights, and the shape of its weight."""
        if not self.was_conv1d:
            return nn.Linear(self.in_features, self.out_features, device="meta"), self.shape
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(self.out_features, self.in_features), self.shape[::-1]

    def extra_repr(self) -> str:
        """Return the description in print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.format!r}, bias={self.bias is not None}"


def replace_linear(
    model: nn.Module,
    name: str,
    format: Format,
    device: Any = None,
    tied: PackedMatrix | None = None,
    shared: PackedModule | None = None,
) -> QuantLinear:
    """Replace a linear layer (nn.Linear or GPT-2's Conv1D) by an empty QuantLinear.

    Args:
        model: The model, changed in place.
        name: Path of the layer.
        format: Format of the weight.
        device: Device of the packed tensors.
        tied: The layer whose matrix to use.
        shared: The module with the parts that the format shares between layers.

    Returns:
        The new layer.
    """
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        shape = (old.out_features, old.in_features)
    else:  # Conv1D stores (in, out)
        assert isinstance(old.weight, Tensor)
        shape = (old.weight.shape[1], old.weight.shape[0])
    new = QuantLinear(format, shape, getattr(old, "bias", None) is not None, device, tied, shared)
    new.was_conv1d = not isinstance(old, nn.Linear)
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, new)
    return new
