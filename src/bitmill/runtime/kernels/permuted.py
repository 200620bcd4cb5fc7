"""Permuted columns: gather the inputs in the same order, then run the inner format's kernel."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bitmill.formats.permuted import Permuted
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec, choose_kernel


@KERNELS.register("permuted")
class PermutedKernel(Kernel):
    """x W^^T = x[order] inner^T."""

    priority = 0

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Permuted formats around what some kernel runs."""
        return None if isinstance(spec.format, Permuted) else f"{spec.format.name} has its columns in place."

    @staticmethod
    def apply(spec: KernelSpec, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        assert isinstance(spec.format, Permuted)
        order = spec.format.own_parts(spec.shape)[0].unpack(tensors["order"]).long()
        inner = replace(spec, format=spec.format.inner)
        return choose_kernel(inner).apply(inner, tensors, x[..., order])
