"""The quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.packed import Packed


class QuantLinear(Packed):
    """y = x W^T + b with W kept packed, for any format.

    tied: another layer whose matrix this one reads; it keeps none of its own then.
    """

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        bias: bool,
        device: Any = None,
        tied: Packed | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self._tied = () if tied is None else (tied,)  # a tuple: it is no part of this layer
        if tied is None:
            self.hold(format, shape, device)
        else:
            self.format, self.shape = format, shape
        self.bias = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False) if bias else None
        self._spec: KernelSpec | None = None

    @property
    def tied(self) -> Packed | None:
        """The layer that keeps the matrix, where it is not this one."""
        return self._tied[0] if self._tied else None

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return super().packed() if self.tied is None else self.tied.packed()

    def _own(self) -> dict[str, Tensor]:
        return {} if self._tied else self.packed()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x."""
        if self._spec is None or self._spec.device != x.device:
            self._spec = KernelSpec(self.format, self.shape, x.device)
            self._kernel = choose_kernel(self._spec)
        y = self._kernel.apply(self._spec, self.packed(), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.format!r}, bias={self.bias is not None}"


def swap_linear(
    model: nn.Module, name: str, format: Format, device: Any = None, tied: Packed | None = None
) -> QuantLinear:
    """Replace the linear (nn.Linear or GPT-2's Conv1D) called `name` by an empty QuantLinear and return it."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        shape = (old.out_features, old.in_features)
    else:  # Conv1D keeps (in, out)
        assert isinstance(old.weight, Tensor)
        shape = (old.weight.shape[1], old.weight.shape[0])
    new = QuantLinear(format, shape, getattr(old, "bias", None) is not None, device, tied)
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, new)
    return new
