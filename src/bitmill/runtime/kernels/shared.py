"""Shared parts: the layer brings them along, so the inner format's kernel does it all."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bitmill.formats.shared import Shared
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec, choose_kernel


@KERNELS.register("shared")
class SharedKernel(Kernel):
    """The inner format's kernel."""

    priority = 0

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Formats whose parts other layers share, around what some kernel runs."""
        return None if isinstance(spec.format, Shared) else f"{spec.format.name} shares nothing."

    @staticmethod
    def apply(spec: KernelSpec, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        assert isinstance(spec.format, Shared)
        inner = replace(spec, format=spec.format.inner)
        return choose_kernel(inner).apply(inner, tensors, x)
