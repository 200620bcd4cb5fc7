"""The quantized linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.runtime.kernels import KernelSpec, choose_kernel


class QuantLinear(nn.Module):
    """y = x W^T + b with W kept packed, for any format.

    The packed tensors are buffers named as on disk. Casting the model (`.to(torch.bfloat16)`) moves them but
    leaves their types alone: they mean what their bits say.
    """

    def __init__(self, format: Format, shape: tuple[int, int], bias: bool, device: Any = None) -> None:
        super().__init__()
        self.format, self.shape = format, shape
        self.out_features, self.in_features = shape
        for name, (size, dtype) in format.layout(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False) if bias else None
        self._spec: KernelSpec | None = None

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self.format.layout(self.shape)}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x."""
        if self._spec is None or self._spec.device != x.device:
            self._spec = KernelSpec(self.format, self.shape, x.device)
            self._kernel = choose_kernel(self._spec)
        y = self._kernel.apply(self._spec, self.packed(), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        kept = self.packed()
        for name in kept:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        except Exception:
            self._buffers.update(kept)
            raise
        probe = fn(torch.empty(0, device=next(iter(kept.values())).device))
        for name, tensor in kept.items():
            # to_empty() maps a meta tensor to fresh memory; every other fn only tells us the device
            moved = torch.empty_like(tensor, device=probe.device) if tensor.is_meta else tensor.to(probe.device)
            self._buffers[name] = moved
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.format!r}, bias={self.bias is not None}"


def swap_linear(model: nn.Module, name: str, format: Format, device: Any = None) -> QuantLinear:
    """Replace the linear (nn.Linear or GPT-2's Conv1D) called `name` by an empty QuantLinear and return it."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        shape = (old.out_features, old.in_features)
    else:  # Conv1D keeps (in, out)
        assert isinstance(old.weight, Tensor)
        shape = (old.weight.shape[1], old.weight.shape[0])
    new = QuantLinear(format, shape, getattr(old, "bias", None) is not None, device)
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, new)
    return new
