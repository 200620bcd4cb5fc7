"""The quantized linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.runtime.kernels import Kernel, KernelSpec, choose_kernel


class QuantLinear(nn.Module):
    """y = x W^T + b with W kept packed, for any format.

    The packed tensors are buffers named as on disk. The first forward hands them to a kernel, which may lay them
    out anew: then the buffers are the kernel's, and only one of the two layouts is held. Whoever asks for the
    packed tensors after that (by name, `packed`, `state_dict`) gets them back, bit by bit, in place of the
    kernel's. Casting the model (`.to(torch.bfloat16)`) moves them but leaves their types alone: they mean what
    their bits say.
    """

    def __init__(self, format: Format, shape: tuple[int, int], bias: bool, device: Any = None) -> None:
        super().__init__()
        self.format, self.shape = format, shape
        self.out_features, self.in_features = shape
        self._kernel: Kernel | None = None
        self._hold({name: torch.empty(n, dtype=t, device=device) for name, (n, t) in format.layout(shape).items()})
        self.bias = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False) if bias else None

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        if self._kernel is not None:
            kernel, self._kernel = self._kernel, None
            for name in kernel.tensors:
                self._buffers.pop(name, None)
            self._hold(kernel.restore())
        return {name: self._buffers[name] for name in self.format.layout(self.shape)}  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x."""
        if self._kernel is None or self._kernel.spec.device != x.device:
            self._prepare(x.device)
        assert self._kernel is not None
        y = self._kernel.apply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _prepare(self, device: torch.device) -> None:
        spec, packed = KernelSpec(self.format, self.shape, device), self.packed()
        kernel = choose_kernel(spec)(spec, packed)
        for name in packed:
            del self._buffers[name]
        self._hold(kernel.tensors)
        self._kernel = kernel

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        self._buffers.update(tensors)

    def __getattr__(self, name: str) -> Any:
        """Packed tensors that the kernel has taken are asked back."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.__dict__.get("_kernel") is None or name not in self.format.layout(self.shape):
                raise
        return self.packed()[name]

    def _save_to_state_dict(self, *args: Any) -> None:
        self.packed()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.packed()
        super()._load_from_state_dict(*args)

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
