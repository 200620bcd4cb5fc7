"""Base of the compiled kernels: a few tokens multiply with packed weights, more with decoded tiles in fixed point.

Up to MAX_TOKENS tokens at a time multiply with packed weights (`gemv`). More of them decode tiles of rows and
multiply in fixed point (`gemm`, csrc/fixed), which rounds inputs x and weights w, with a step for every 64
columns:

    |error of y_r| <= sum over blocks b of max|x_b| / 11584 * sum of |W^_rb| + max|W^_rb| / 11584 * sum of |x_b|,

for Gaussian numbers 2e-4 of the output, comparable to fp16, and faster than fp32. Inputs that need gradients,
traces and BITMILL_ACTIVATIONS=float32 multiply the tiles in floats, bit by bit as the reference kernel does.
"""

from __future__ import annotations

import os
import threading
from abc import abstractmethod

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.native import is_available, native, threads
from bitmill.runtime import ops
from bitmill.runtime.activations import activations
from bitmill.runtime.kernels.base import Kernel, KernelSpec
from bitmill.runtime.kernels.mapped import is_mapped_file, release_pages
from bitmill.runtime.kernels.reference import RowDecoder, matmul_by_tiles, row_decoder, row_tiles

MAX_TOKENS = 16
PIECE_BYTES = 4 << 20  # of a mapped matrix that are repacked at once
_memory = threading.local()


def uses_gemv(x: Tensor) -> bool:
    """Return True if x (..., in) multiplies with packed weights: few tokens on the CPU, without gradients."""
    return 0 < x.numel() // x.shape[-1] <= MAX_TOKENS and _may_round(x)


def uses_gemm(x: Tensor) -> bool:
    """Return True if x (..., in) multiplies in fixed point: more tokens, no gradients, no trace."""
    return (
        x.numel() // x.shape[-1] > MAX_TOKENS
        and _may_round(x)
        and not is_traced(x)
        and activations().many != "float32"
    )


def _may_round(x: Tensor) -> bool:
    return x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def cpu_unsupported_reason(spec: KernelSpec) -> str | None:
    """Return None if compiled kernels run on the device of `spec`, or the reason; formats are not considered."""
    if spec.device.type != "cpu":
        return f"it runs on cpu, not on {spec.device.type}."
    return None if is_available() else "the compiled kernels are not installed."


def may_compile(spec: KernelSpec) -> bool:
    """Return True if a wrapper may run compiled code: on the CPU, without BITMILL_KERNEL=reference."""
    return os.environ.get("BITMILL_KERNEL") != "reference" and cpu_unsupported_reason(spec) is None


def _repacked(words: Tensor, layout: list[int]) -> Tensor:
    """Return the codes in the layout of csrc/lut/layout.h.

    Those of a mapped file are repacked in pieces whose pages are released, so that a large matrix is held once.

    Args:
        words: Packed codes (rows, words of a row).
        layout: Arguments of the extension's Layout.
    """
    whole, (rows, *sizes) = native().Layout(*layout), layout
    out = torch.zeros(whole.code_bytes, dtype=torch.uint8)
    if words.nbytes <= PIECE_BYTES or not is_mapped_file(words):
        native().to_layout(whole, words, out, threads())
        return out
    tile, done = layout[-2], 0  # rows_per_tile
    step = max(1, PIECE_BYTES // (words[0].nbytes * tile)) * tile
    for first in range(0, rows, step):
        piece = words[first : first + step]
        part = native().Layout(len(piece), *sizes)
        native().to_layout(part, piece, out[done : done + part.code_bytes], threads())
        release_pages(piece)
        done += part.code_bytes
    return out


def tile_buffer(rows: slice, columns: int) -> Tensor:
    """Return memory for a decoded tile, which the next tile of the thread overwrites.

    The system has to clear fresh memory first, which takes longer than decoding.

    Args:
        rows: Rows of the tile.
        columns: Columns of the matrix.

    Returns:
        fp32 (rows, columns), uninitialized.
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
        """Multiply x (..., in) to (..., out)."""
        multiply = self.gemv if uses_gemv(x) else self.gemm if uses_gemm(x) and not self.spec.exact else None
        if multiply is None:
            return matmul_by_tiles(self.spec, self._traced_rows if is_traced(x) else self.decoder(), x)
        y = multiply(x.reshape(-1, self.spec.shape[1]).to(torch.float32))
        return y.to(x.dtype).view(*x.shape[:-1], self.spec.shape[0])

    @abstractmethod
    def gemv(self, x: Tensor) -> Tensor:
        """Multiply a few tokens (tokens, in) fp32 with packed weights to (tokens, out)."""

    def gemm(self, x: Tensor) -> Tensor:
        """Multiply many tokens (tokens, in) fp32 in fixed point, a decoded tile at a time, to (tokens, out)."""
        inputs = _memory.inputs = getattr(_memory, "inputs", None) or native().FixedInputs()
        inputs.read(x.contiguous(), threads())
        y, decode = torch.empty(x.shape[0], self.spec.shape[0]), self.decoder()
        for rows in row_tiles(self.spec.shape):
            inputs.product(decode(rows).contiguous(), y, rows.start, threads())
        return y

    @abstractmethod
    def decoder(self) -> RowDecoder:
        """Return a function that decodes rows of W^ as `format.dequantize` does."""

    def weights(self, rows: slice) -> Tensor:
        """Return rows of W^, fp32."""
        return self.decoder()(rows).clone()

    def _traced_rows(self, rows: slice) -> Tensor:
        return self.rows(torch.arange(rows.start, rows.stop))


class RepackedKernel(CompiledKernel):
    """A kernel that holds the codes in the layout of csrc/lut/layout.h, and the packed parameters for decoding."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], layout: list[int]) -> None:
        """Repack the codes.

        Args:
            spec: The matrix.
            tensors: Its packed tensors by name.
            layout: Arguments of the extension's Layout (csrc/bind.cpp).
        """
        self.spec, self.layout, self._format_json = spec, layout, ops.format_to_json(spec.format)
        self._words = tensors["codes"].shape[1]
        self.packed = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        self.codes = _repacked(tensors["codes"].contiguous(), layout)

    def named_tensors(self, prefix: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all tensors by name.

        Args:
            prefix: Prefix of the names, which no packed tensor has.
            parts: Tensors of the kernel besides codes and packed parameters.
        """
        packed = {f"packed_{name}": tensor for name, tensor in self.packed.items()}
        every = {"codes": self.codes, **parts, **packed}
        return {f"{prefix}_{name}": tensor for name, tensor in every.items()}

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, bit by bit."""
        words = torch.empty(self.spec.shape[0], self._words, dtype=torch.int32)
        native().from_layout(native().Layout(*self.layout), self.codes, words, threads())
        return {"codes": words, **self.packed}

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        format = self.spec.format
        assert isinstance(format, GroupFormat)
        if is_traced(ids):
            packed = [self.packed[name] for name in format.layout(self.spec.shape) if name != "codes"]
            shape = list(self.spec.shape)
            return ops.repacked_rows(ids, self.codes, packed, self.layout, self._format_json, shape)
        codes = torch.empty(len(ids), self.layout[1], dtype=torch.uint8)
        native().codes_at(native().Layout(*self.layout), self.codes, ids.contiguous(), codes, threads())
        return format.rows_of(codes, self.packed, self.spec.shape, ids)

    def decoder(self) -> RowDecoder:
        """Return a function that decodes rows by the format."""
        return row_decoder(self.spec, self._params(), self._unpacked_codes)

    def _params(self) -> Params:
        return self.spec.format.unpack_params(self.packed, self.spec.shape)

    def _unpacked_codes(self, rows: slice) -> Tensor:
        out = torch.empty(rows.stop - rows.start, self.layout[1], dtype=torch.uint8)
        native().codes_of(native().Layout(*self.layout), self.codes, rows.start, out, threads())
        return out
