"""Quantized inputs: round them, and run the inner format's kernel."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.wrapper import WrapperKernel


@KERNELS.register("quantized_inputs")
class QuantizedInputsKernel(WrapperKernel):
    """Q(x) W^^T, with any format of the inputs."""

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
        return self.inner.apply(self.effective_inputs(x))

    def effective_inputs(self, x: Tensor) -> Tensor:
        """Return the rounded inputs."""
        return self._format.effective_inputs(x, self._params)
