"""Rotated formats: rotate the inputs, run the inner format's kernel, rotate the outputs back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitmill.formats.rotated import Rotated
from bitmill.runtime.kernels.around import Around
from bitmill.runtime.kernels.base import KERNELS, KernelSpec


@KERNELS.register("rotated")
class RotatedKernel(Around):
    """x W^^T = ((x diag(1/s)) V^T Q^T) U: two cheap rotations around any kernel."""

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Rotated formats around what some kernel runs."""
        return None if isinstance(spec.format, Rotated) else f"{spec.format.name} is not in a rotated basis."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Rotated)
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))
        self._format = spec.format

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out). Rotations are computed in fp32, the product between in the type of x."""
        rows, columns = self.spec.shape
        y = x.to(torch.float32)
        if self._format.rescale:
            y = y / self.own["rescale"].to(torch.float32)
        y = self._format.on_inputs(columns, x.device).forward(y).to(x.dtype)
        y = self.inner.apply(y)
        U = self._format.on_outputs(rows, x.device)
        return y if U is None else U.inverse(y).to(x.dtype)
