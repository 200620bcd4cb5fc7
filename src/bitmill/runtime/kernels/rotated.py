"""Rotated formats: rotate the inputs, run the inner format's kernel, rotate the outputs back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitmill.formats.rotated import Rotated
from bitmill.native import native
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import may_compile, uses_gemv
from bitmill.runtime.kernels.rotation_plan import NOTHING, rotation_plan
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("rotated")
class RotatedKernel(WrapperKernel):
    """x W^^T = ((x diag(1/s)) V^T Q^T) U: two cheap rotations around any kernel."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for rotated formats, or the reason."""
        return None if isinstance(spec.format, Rotated) else f"{spec.format.name} is not in a rotated basis."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Rotated)
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))
        rows, columns = spec.shape
        self._rescale = self.own["rescale"].to(torch.float32) if spec.format.rescale else None
        self._V, self._U = spec.format.on_inputs(columns, spec.device), spec.format.on_outputs(rows, spec.device)
        # a few tokens are rotated by compiled code if it supports the rotations of both sides
        self._plans = [rotation_plan(self._V, False), None if self._U is None else rotation_plan(self._U, True)]
        self._compiled = may_compile(spec) and None not in self._plans[: 1 if self._U is None else 2]

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out). Rotations are fp32; many tokens multiply in the type of x."""
        if self._compiled and uses_gemv(x):
            return (
                self._gemv(x.reshape(-1, self.spec.shape[1])).to(x.dtype).view(*x.shape[:-1], self.spec.shape[0])
            )
        y = x.to(torch.float32)
        if self._rescale is not None:
            y = y / self._rescale
        y = self.inner.apply(self._V.forward(y).to(x.dtype))
        return y if self._U is None else self._U.inverse(y).to(x.dtype)

    def output_error(self, W: Tensor) -> Tensor:
        """Return the error of the inner kernel, of which a rotation of the outputs gives all rows a share."""
        s = torch.ones(1, W.shape[1], device=W.device) if self._rescale is None else self._rescale
        error = self.inner.output_error(W * s) * s.pow(-2).mean().sqrt()
        return error if self._U is None else error.square().mean().sqrt().expand(len(error))

    def _gemv(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        if self._rescale is not None:
            y = y / self._rescale
        forward, back = self._plans
        assert forward is not None
        y = self.inner.apply(forward.apply(y))
        return y if back is None else back.apply(y)

    def step_linear(self) -> Any:
        """Return the inner kernel's matrix between the rotations, if these are compiled, for the decode step."""
        inner = self.inner.step_linear() if self._compiled else None
        if inner is None:
            return None
        forward, back = self._plans
        assert forward is not None
        rescale = None if self._rescale is None else self._rescale.flatten()
        return native().rotated_linear(inner, rescale, *forward.parts, *(NOTHING if back is None else back.parts))
