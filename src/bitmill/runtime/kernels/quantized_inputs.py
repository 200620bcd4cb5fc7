"""Quantized inputs: integers of inputs and weights multiply; other formats are rounded, and multiply in floats.

A few tokens are rounded and multiplied by the compiled lookup kernel, also in the decode step. More tokens become
codes here and multiply in `int8_linear`, on a GPU in `triton_codes`, which also has floats of 8 bits. Inputs whose
integers do not multiply are multiplied as they were rounded, in fp32: no kernel rounds them once more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.scalar import RangeFormat
from bitmill.native import threads
from bitmill.runtime.activations import activations
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import uses_gemv
from bitmill.runtime.kernels.int8_linear import int8_linear
from bitmill.runtime.kernels.lut import Grid, Lut
from bitmill.runtime.kernels.triton import Triton
from bitmill.runtime.kernels.triton_codes import multiply_on_gpu
from bitmill.runtime.kernels.wrapper import WrapperKernel
from bitmill.runtime.triton.available import MAX_TOKENS


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
        integers = spec.format.multiplies_integers and spec.format.steps_fit(spec.shape[1])
        super().__init__(spec, tensors, replace(spec, format=spec.format.inner, exact=not integers))
        self._grid_linear: tuple[int, Any] | None = None
        self._params = {part.name: part.unpack(self.own[part.name]) for part in spec.format.own_parts(spec.shape)}

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        flat = x.reshape(-1, self.spec.shape[1])
        lut = self._lut(x)
        if lut is None or not len(flat):
            y = self._multiply_on_gpu(flat) if len(flat) > MAX_TOKENS else None
            return self.inner.apply(self.effective_inputs(x)) if y is None else y.view(*x.shape[:-1], -1)
        flat = flat.to(torch.float32)
        few = self._few_tokens(lut) if uses_gemv(x) else None
        if few is None:
            y = self._multiply_integers(flat, lut)
        else:
            y = torch.empty(len(flat), self.spec.shape[0])
            few.product(flat.contiguous(), y, threads())
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiply_on_gpu(self, x: Tensor) -> Tensor | None:
        """Multiply many tokens (tokens, in) by their codes; None where Triton multiplies decoded weights."""
        may = self._format.multiplies_as_stored and not self._format.threshold
        if not may or is_traced(x) or (torch.is_grad_enabled() and x.requires_grad):
            return None
        if not isinstance(self.inner, Triton):
            return None
        inputs, broken = self._format.quantize_inputs(x.to(torch.float32), self._params)
        y = multiply_on_gpu(inputs, self.inner)
        return None if y is None else y.masked_fill(broken, torch.nan).to(x.dtype)

    def step_linear(self) -> Any:
        """Return the matrix that rounds its inputs, for the decode step."""
        lut = self._integer_matrix()
        return None if lut is None else self._few_tokens(lut)

    def _few_tokens(self, lut: Lut) -> Any:
        """Return the extension's view for a few tokens, made once; None where it has none."""
        place = lut.codes.data_ptr()
        if self._grid_linear is None or self._grid_linear[0] != place:  # moved, for example to shared memory
            grid = self._grid()
            self._grid_linear = place, None if grid is None else lut.grid_linear(grid)
        return self._grid_linear[1]

    def _grid(self) -> Grid | None:
        """Return the levels of the inputs; None where torch rounds them."""
        format, columns = self._format.input_format, self.spec.shape[1]
        if self._format.uncompiled_reason(columns) is not None or not isinstance(format, RangeFormat):
            return None
        static = {name.removeprefix("input_"): float(value) for name, value in self._params.items()}
        width = min(format.width((1, columns)), columns)
        return Grid(format.bits, width, format.symmetric, threshold=self._format.threshold, **static)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grid_linear": None}

    def effective_inputs(self, x: Tensor) -> Tensor:
        """Return the rounded inputs."""
        return self._format.effective_inputs(x, self._params)

    def _lut(self, x: Tensor) -> Lut | None:
        """Return the inner kernel where it multiplies the integers of x; None for floats."""
        floats = is_traced(x) or (torch.is_grad_enabled() and x.requires_grad) or activations().few == "float32"
        return None if floats else self._integer_matrix()

    def _integer_matrix(self) -> Lut | None:
        """Return the inner kernel where it multiplies integers; None where inputs are rounded for its floats."""
        integers = self._format.multiplies_integers and self._format.steps_fit(self.spec.shape[1])
        return self.inner if integers and isinstance(self.inner, Lut) else None

    def _multiply_integers(self, x: Tensor, lut: Lut) -> Tensor:
        """Multiply inputs, fp32 (tokens, in), as integers of 8 bits."""
        kept = self._format.float_columns(x)
        inputs, broken = self._format.quantize_inputs(
            x if kept is None else x.masked_fill(kept, 0.0), self._params
        )
        digits, scales, zeros = self._format.input_format.integer_digits(inputs.codes, inputs.params)
        width = min(self._format.input_format.width(inputs.shape), x.shape[1])
        y = _multiply_digits(digits, scales, zeros, lut, width)
        if kept is not None and bool(kept.any()):
            columns = kept.nonzero()[:, 0]
            y = y + x[:, columns] @ lut.columns(columns).T
        return y.masked_fill(broken, torch.nan)


def _multiply_digits(digits: Tensor, scales: Tensor, zeros: Tensor | None, lut: Lut, width: int) -> Tensor:
    """Multiply integers of one or more bytes: each byte as tokens of its own, whose sums are exact.

    Args:
        digits: int8 (bytes, tokens, in), the lowest byte first.
        scales: fp32 (tokens|1, steps).
        zeros: of that shape, or None for 0.
        lut: the matrix.
        width: columns that share a scale.

    Returns:
        fp32 (tokens, out).
    """
    count, tokens, _ = digits.shape
    if count == 1:
        return int8_linear(digits[0], scales, lut, zeros, width)
    steps = scales.expand(tokens, -1)
    of_bytes = torch.cat([steps * 256.0**k for k in range(count)])
    if zeros is not None:  # once, with the lowest byte
        zeros = torch.cat([zeros.expand_as(steps), torch.zeros_like(steps).repeat(count - 1, 1)])
    products = int8_linear(digits.flatten(0, 1).contiguous(), of_bytes, lut, zeros, width)
    return products.view(count, tokens, -1).sum(0)
