"""Base of the compiled kernels: few tokens are multiplied with packed weights, many with decoded tiles of them.

Up to MOST_TOKENS tokens at a time are a product with packed weights. More of them decode tiles of rows and
multiply in fixed point (csrc/fixed), which rounds inputs x and weights w alike, with a step for every 64 columns:

    |error of y_r| <= sum over blocks b of max|x_b| / 11584 * sum of |W^_rb| + max|W^_rb| / 11584 * sum of |x_b|,

for Gaussian numbers 2e-4 of the output, what fp16 would do, and faster than fp32. Inputs that need gradients,
traces and BITMILL_ACTIVATIONS=float32 multiply the tiles in floats, bit by bit as the reference kernel does.
"""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import Kernel, KernelSpec
from bitmill.runtime.kernels.reference import decoded, matmul_by_tiles, row_tiles
from bitmill.runtime.native import activations, is_available, native, threads

MAX_TOKENS = 16
_memory = threading.local()


def uses_gemv(x: Tensor) -> bool:
    """Whether x (..., in) is for the extension: few tokens on the CPU, without gradients."""
    return 0 < x.numel() // x.shape[-1] <= MAX_TOKENS and _may_round(x)


def uses_gemm(x: Tensor) -> bool:
    """Whether x (..., in) is multiplied in fixed point: many tokens, and nobody who looks on or learns."""
    return (
        x.numel() // x.shape[-1] > MAX_TOKENS
        and _may_round(x)
        and not ops.is_traced(x)
        and activations() != "float32"
    )


def _may_round(x: Tensor) -> bool:
    return x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def cpu_unsupported_reason(spec: KernelSpec) -> str | None:
    """Why no compiled kernel can serve a layer, whatever its format; None where one can."""
    if spec.device.type != "cpu":
        return f"it runs on cpu, not on {spec.device.type}."
    return None if is_available() else "the compiled kernels are not installed."


def may_compile(spec: KernelSpec) -> bool:
    """Whether a wrapper may run compiled code around its inner kernel: not where the reference is asked for."""
    return os.environ.get("BITMILL_KERNEL") != "reference" and cpu_unsupported_reason(spec) is None


def tile_buffer(rows: slice, columns: int) -> Tensor:
    """Room for a decoded tile, (rows, columns) fp32, which the thread's next tile overwrites.

    Fresh memory has to be cleared by the system first, which takes longer than decoding.
    """
    size = (rows.stop - rows.start) * columns
    held = getattr(_memory, "tile", None)
    if held is None or held.numel() < size:
        held = _memory.tile = torch.empty(size)
    return held[:size].view(-1, columns)


class CompiledKernel(Kernel):
    """A kernel of the extension."""

    priority = 10

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        multiply = self.gemv if uses_gemv(x) else self.gemm if uses_gemm(x) else None
        if multiply is None:
            return matmul_by_tiles(self.spec, self._tile if ops.is_traced(x) else self.decoder(), x)
        y = multiply(x.reshape(-1, self.spec.shape[1]).to(torch.float32))
        return y.to(x.dtype).view(*x.shape[:-1], self.spec.shape[0])

    @abstractmethod
    def gemv(self, x: Tensor) -> Tensor:
        """x (tokens, in) to (tokens, out), fp32, by the extension."""

    def gemm(self, x: Tensor) -> Tensor:
        """The same in fixed point, a decoded tile at a time."""
        inputs = _memory.inputs = getattr(_memory, "inputs", None) or native().FixedInputs()
        inputs.read(x.contiguous(), threads())
        y, weights = torch.empty(x.shape[0], self.spec.shape[0]), self.decoder()
        for rows in row_tiles(self.spec.shape):
            inputs.product(weights(rows).contiguous(), y, rows.start, threads())
        return y

    @abstractmethod
    def decoder(self) -> Callable[[slice], Tensor]:
        """Some rows of W^ as a function, fp32, as `format.dequantize` gives them, until the next call."""

    def weights(self, rows: slice) -> Tensor:
        """Some rows of W^."""
        return self.decoder()(rows).clone()

    def _tile(self, rows: slice) -> Tensor:
        """The same for traces."""
        return self.rows(torch.arange(rows.start, rows.stop))


class RepackedKernel(CompiledKernel):
    """A kernel that holds the codes in the layout of csrc/lut/layout.h, and the packed parameters for decoding."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], layout: list[int]) -> None:
        """layout: the arguments of `Layout` in csrc/bind.cpp."""
        self.spec, self.layout, self._text = spec, layout, ops.text_of(spec.format)
        self._words = tensors["codes"].shape[1]
        self.packed = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        made = native().Layout(*layout)
        self.codes = torch.zeros(made.code_bytes, dtype=torch.uint8)
        native().to_layout(made, tensors["codes"].contiguous(), self.codes, threads())

    def held(self, prefix: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors, with names that no packed tensor has."""
        packed = {f"packed_{name}": tensor for name, tensor in self.packed.items()}
        every = {"codes": self.codes, **parts, **packed}
        return {f"{prefix}_{name}": tensor for name, tensor in every.items()}

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors, bit by bit."""
        words = torch.empty(self.spec.shape[0], self._words, dtype=torch.int32)
        native().from_layout(native().Layout(*self.layout), self.codes, words, threads())
        return {"codes": words, **self.packed}

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,): fp32 (n, in)."""
        format = self.spec.format
        assert isinstance(format, GroupFormat)
        if ops.is_traced(ids):
            packed = [self.packed[name] for name in format.layout(self.spec.shape) if name != "codes"]
            return ops.repacked_rows(ids, self.codes, packed, self.layout, self._text, list(self.spec.shape))
        codes = torch.empty(len(ids), self.layout[1], dtype=torch.uint8)
        native().codes_at(native().Layout(*self.layout), self.codes, ids.contiguous(), codes, threads())
        return format.rows_of(codes, self.packed, self.spec.shape, ids)

    def decoder(self) -> Callable[[slice], Tensor]:
        """By the format."""
        return decoded(self.spec, self._params(), self._rows)

    def _params(self) -> Params:
        return self.spec.format.unpack_params(self.packed, self.spec.shape)

    def _rows(self, rows: slice) -> Tensor:
        out = torch.empty(rows.stop - rows.start, self.layout[1], dtype=torch.uint8)
        native().codes_of(native().Layout(*self.layout), self.codes, rows.start, out, threads())
        return out
