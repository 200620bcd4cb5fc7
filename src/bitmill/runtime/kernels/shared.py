"""Shared parts: the layer brings them along, so the inner format's kernel does it all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bitmill.formats.shared import Shared
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("shared")
class SharedKernel(WrapperKernel):
    """The inner format's kernel."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Formats whose parts other layers share, around what some kernel runs."""
        return None if isinstance(spec.format, Shared) else f"{spec.format.name} shares nothing."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Shared)
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.inner.apply(x)

    def step_linear(self) -> Any:
        """The inner kernel's."""
        return self.inner.step_linear()
