"""Formats with parts that layers share: the layer passes them, and the inner format's kernel multiplies."""

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
        """Return None for formats with shared parts, or the reason."""
        return None if isinstance(spec.format, Shared) else f"{spec.format.name} shares nothing."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Shared)
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        return self.inner.apply(x)

    def step_linear(self) -> Any:
        """Return the inner kernel's matrix for the decode step."""
        return self.inner.step_linear()
