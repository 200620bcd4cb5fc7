"""Quantized inputs: integers of inputs and weights multiply; other formats are rounded, and multiply in floats."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.runtime.activations import activations
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.int8_linear import int8_linear
from bitmill.runtime.kernels.lut import Lut
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("quantized_inputs")
class QuantizedInputsKernel(WrapperKernel):
    """Q(x) W^^T: an int8 product where levels of both are evenly spaced and the compiled kernel has the matrix."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for formats that quantize inputs, or the reason."""
        if isinstance(spec.format, QuantizedInputs):
            return None
        return f"{spec.format.name} multiplies inputs as they are."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, QuantizedInputs)
        self._format = spec.format
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner))
        self._params = {part.name: part.unpack(self.own[part.name]) for part in spec.format.own_parts(spec.shape)}

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        flat = x.reshape(-1, self.spec.shape[1])
        lut = self._lut(x)
        if lut is None or not len(flat):
            return self.inner.apply(self.effective_inputs(x))
        return self._multiply_integers(flat.to(torch.float32), lut).to(x.dtype).view(*x.shape[:-1], -1)

    def effective_inputs(self, x: Tensor) -> Tensor:
        """Return the rounded inputs."""
        return self._format.effective_inputs(x, self._params)

    def _lut(self, x: Tensor) -> Lut | None:
        """Return the inner kernel where it multiplies the integers of x; None for floats."""
        floats = is_traced(x) or (torch.is_grad_enabled() and x.requires_grad) or activations().few == "float32"
        if floats or not self._format.multiplies_integers or not isinstance(self.inner, Lut):
            return None
        return self.inner

    def _multiply_integers(self, x: Tensor, lut: Lut) -> Tensor:
        """Multiply inputs, fp32 (tokens, in), as int8 codes around the middle of their levels."""
        kept = self._format.float_columns(x)
        inputs, broken = self._format.quantize_inputs(
            x if kept is None else x.masked_fill(kept, 0.0), self._params
        )
        middle = 1 << (inputs.format.core.bits - 1)
        codes = (inputs.codes.to(torch.int16) - middle).to(torch.int8)
        zeros = inputs.params.get("zero")
        width = min(self._format.input_format.width(inputs.shape), x.shape[1])
        y = int8_linear(codes, inputs.params["scale"], lut, None if zeros is None else zeros - middle, width)
        if kept is not None and bool(kept.any()):
            y = y + lut.apply(x.masked_fill(~kept, 0.0))
        return y.masked_fill(broken, torch.nan)
