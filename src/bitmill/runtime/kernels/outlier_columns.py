"""Outlier columns: the inner format's kernel on most inputs, and a thin float product with the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitmill.formats.outlier_columns import OutlierColumns, base_columns
from bitmill.native import native, unsupported_reason
from bitmill.numerics.sparse import from_index
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("outlier_columns")
class OutlierColumnsKernel(WrapperKernel):
    """x W^^T = x[base] inner^T + x[outliers] V^T."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for formats with outlier columns, or the reason."""
        return None if isinstance(spec.format, OutlierColumns) else f"{spec.format.name} has no outlier columns."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, OutlierColumns)
        inner = replace(spec, format=spec.format.inner, shape=spec.format.inner_shape(spec.shape))
        super().__init__(spec, tensors, inner)
        self._outliers = from_index(self.own["outlier_columns"])
        self._base = base_columns(self._outliers, spec.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out). The outliers multiply in fp32."""
        few = x[..., self._outliers].to(torch.float32)
        added = torch.nn.functional.linear(few, self.own["outlier_values"].to(torch.float32))
        return (self.inner.apply(x[..., self._base]).to(torch.float32) + added).to(x.dtype)

    def step_linear(self) -> Any:
        """Return the inner kernel's matrix and the columns apart, for the decode step."""
        inner = self.inner.step_linear()
        if inner is None or unsupported_reason("outlier_linear") is not None:
            return None
        values = self.own["outlier_values"].view(torch.int16)
        return native().outlier_linear(inner, self._base, self._outliers, values)

    def output_error(self, W: Tensor) -> Tensor:
        """Return the error of the inner kernel, whose matrix has the other columns, and that of fp32."""
        return self.inner.output_error(W[:, self._base]) + 1e-6 * W[:, self._outliers].norm(dim=1)
