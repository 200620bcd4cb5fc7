"""Low rank: the inner format's kernel, plus two thin products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitmill.formats.low_rank import LowRank
from bitmill.native import native, unsupported_reason
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("low_rank")
class LowRankKernel(WrapperKernel):
    """x W^^T = x inner^T + (x V^T) U^T."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for formats with a product of low rank, or the reason."""
        return None if isinstance(spec.format, LowRank) else f"{spec.format.name} has no product of low rank."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, LowRank)
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out). The thin products are fp32."""
        left, right = (self.own[name].to(torch.float32) for name in ("low_rank_left", "low_rank_right"))
        added = linear(linear(self.effective_inputs(x).to(torch.float32), right), left)
        return (self.inner.apply(x).to(torch.float32) + added).to(x.dtype)

    def step_linear(self) -> Any:
        """Return the inner kernel's matrix and the factors, for the decode step."""
        if self.spec.format.uncompiled_reason(self.spec.shape[1]) is not None:
            return None
        inner = self.inner.step_linear()
        if inner is None or unsupported_reason("low_rank_linear") is not None:
            return None
        left, right = (self.own[name].view(torch.int16) for name in ("low_rank_left", "low_rank_right"))
        return native().low_rank_linear(inner, left, right)
