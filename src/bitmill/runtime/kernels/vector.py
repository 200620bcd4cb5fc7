"""Lattice, pyramid and trellis codes, rows of which are decoded in the cache and multiplied in fp32 (csrc/vector).

Codes stay packed. Decoding rounds as the formats' `dequantize` does: many tokens, which multiply decoded tiles
with torch, equal the reference kernel bit by bit; a few tokens differ only by the order of fp32 sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.formats import Format
from bitmill.formats.e8 import E8
from bitmill.formats.pyramid import LENGTHS, Pyramid
from bitmill.formats.trellis import Trellis
from bitmill.formats.vector import VectorFormat
from bitmill.native import native, threads, unsupported_reason
from bitmill.numerics import e8, trellis
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import CompiledKernel, cpu_unsupported_reason, tile_buffer
from bitmill.runtime.kernels.reference import RowDecoder, decode_rows

_SETS = (E8, Pyramid, Trellis)  # csrc/vector/vector.h: VectorSet


@KERNELS.register("vector")
class VectorKernel(CompiledKernel):
    """Decode into the cache and multiply, compiled for this machine's instruction set."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for the lattice E8, pyramids and trellises on the CPU, or the reason."""
        if not isinstance(spec.format, _SETS):
            return f"{spec.format.name} has no fixed set of vectors."
        if isinstance(spec.format, Trellis) and (reason := unsupported_reason("trellis_codes")):
            return reason
        return cpu_unsupported_reason(spec)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        self._format_json = ops.format_to_json(spec.format)
        format = spec.format
        assert isinstance(format, VectorFormat)
        scale = format.unpack_params(tensors, spec.shape)["scale"].contiguous()
        self._plan = [_SETS.index(type(format)), format.width(spec.shape), format.bits]
        self._parts = [tensors["codes"].contiguous(), scale, _table(format)]

    def gemv(self, x: Tensor) -> Tensor:
        """Multiply a few tokens (tokens, in), decoding each row once."""
        return ops.vector_linear(x, self._parts, self._plan)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        return (
            decode_rows(self.spec, self.tensors, self._format_json, ids) if is_traced(ids) else super().rows(ids)
        )

    def decoder(self) -> RowDecoder:
        """Return a function that decodes rows as the product does."""

        def weights(rows: slice) -> Tensor:
            out = tile_buffer(rows, self.spec.shape[1])
            native().vector_decode(*self._plan, *self._parts, rows.start, out, threads())
            return out

        return weights

    def step_linear(self) -> Any:
        """Return the matrix for the decode step."""
        set, width, bits = self._plan
        return native().step_vector_linear(set, self.spec.shape[1], width, bits, *self._parts)


def _table(format: Format) -> Tensor:
    if isinstance(format, E8):
        return e8.patterns().flatten()
    if isinstance(format, Trellis):
        return trellis.points(format.state_bits, torch.device("cpu"))  # one table for all layers
    return torch.tensor(LENGTHS)
