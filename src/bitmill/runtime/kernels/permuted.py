"""Permuted columns: gather the inputs in the order of the columns, then run the inner format's kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bitmill.formats.permuted import Permuted
from bitmill.native import native
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("permuted")
class PermutedKernel(WrapperKernel):
    """x W^^T = x[order] inner^T."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for permuted formats, or the reason."""
        return None if isinstance(spec.format, Permuted) else f"{spec.format.name} has its columns in place."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Permuted)
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))
        self._order = spec.format.own_parts(spec.shape)[0].unpack(self.own["order"]).long()

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        return self.inner.apply(x[..., self._order])

    def step_linear(self) -> Any:
        """Return the inner kernel's matrix behind the gather, for the decode step."""
        inner = self.inner.step_linear()
        return None if inner is None else native().permuted_linear(inner, self._order)
