"""Sums of codebook vectors: tables of products with the inputs, shared by all rows (csrc/additive).

The product of a block of inputs with each vector of a codebook is computed once a token; a code then costs a
lookup and an addition. Tables are rounded to 13 bits, so that one vector looks up 64 rows; an output moves by
at most

    sum over its codes of scale * max|products of the inputs there with all vectors, in eight codes| / 8190
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.formats.additive import Additive
from bitmill.native import native
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import RepackedKernel, cpu_unsupported_reason

_ROWS, _CHUNK = 64, 8  # of a tile, codes: csrc/additive/additive.h


@KERNELS.register("additive")
class AdditiveKernel(RepackedKernel):
    """Lookups in tables of products, compiled for this machine's instruction set."""

    tolerance = 5e-3

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for additive formats on the CPU, or the reason."""
        if not isinstance(spec.format, Additive):
            return f"{spec.format.name} has no codebooks to add."
        if spec.exact:
            return "inputs are to be float32."
        return cpu_unsupported_reason(spec)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        format, (rows, columns) = spec.format, spec.shape
        assert isinstance(format, Additive)
        codes = format.codes_in(columns)
        group = min(codes, format.width(spec.shape) // format.block * format.codebooks)
        super().__init__(spec, tensors, [rows, codes, group, format.bits, _ROWS, -(-group // _CHUNK) * _CHUNK])
        params = format.unpack_params(tensors, spec.shape)
        books = params["codebooks"][0, 0].transpose(1, 2)  # (codebooks, width, 2**bits)
        self._books = books.repeat(1, 1, (64 if format.bits <= 6 else 256) >> format.bits).contiguous()
        self._scales = _tiled(params["scale"], rows, -(-codes // group)).view(torch.uint8)

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes and parameters as the kernel reads them, and the packed parameters."""
        return self.named_tensors("additive", {"books": self._books, "scales": self._scales})

    def gemv(self, x: Tensor) -> Tensor:
        """Multiply a few tokens (tokens, in) by table lookup."""
        return ops.additive(x, self.codes, self._books, self._scales, self.layout)

    def step_linear(self) -> Any:
        """Return the matrix for the decode step."""
        layout = native().Layout(*self.layout)
        return native().additive_linear(layout, self.spec.shape[1], self.codes, self._books, self._scales)


def _tiled(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Return scales (rows|1, groups|1) as fp16 in the order of tiles, (tiles, groups, 64), flattened."""
    tiles = -(-rows // _ROWS)
    full = torch.zeros(tiles * _ROWS, groups, dtype=torch.float16)
    full[:rows] = scale.expand(rows, groups)
    return full.unflatten(0, (tiles, _ROWS)).transpose(1, 2).flatten().contiguous()
