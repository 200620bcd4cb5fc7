"""Rotated formats: rotate the inputs, run the inner format's kernel, rotate the outputs back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitmill.formats.rotated import Rotated
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec, choose_kernel


@KERNELS.register("rotated")
class RotatedKernel(Kernel):
    """x W^^T = ((x diag(1/s)) V^T Q^T) U: two cheap rotations around any kernel."""

    priority = 0

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Rotated formats around what some kernel runs."""
        return None if isinstance(spec.format, Rotated) else f"{spec.format.name} is not in a rotated basis."

    @staticmethod
    def apply(spec: KernelSpec, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """x (..., in) to (..., out). Rotations are computed in fp32, the product between in the type of x."""
        format = spec.format
        assert isinstance(format, Rotated)
        rows, columns = spec.shape
        y = x.to(torch.float32)
        if format.rescale:
            y = y / tensors["rescale"].to(torch.float32)
        y = format.on_inputs(columns, x.device).forward(y).to(x.dtype)
        inner = replace(spec, format=format.inner)
        y = choose_kernel(inner).apply(inner, tensors, y)
        U = format.on_outputs(rows, x.device)
        return y if U is None else U.inverse(y).to(x.dtype)
