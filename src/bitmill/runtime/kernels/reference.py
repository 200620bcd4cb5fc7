"""The reference kernel: decode a tile of rows, multiply, discard it. Correct for every format and device, but
slow.

Never more than one tile of the float weight exists, so a model runs in its packed size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec

RowDecoder = Callable[[slice], Tensor]  # rows of W^ to fp32 (rows, in), valid until the next call

# Weights decoded at a time: 1 M are 4 MB in fp32, about a second-level cache.
_TILE = 1 << 20


@KERNELS.register("reference")
class Reference(Kernel):
    """Tiles of rows decoded and multiplied by torch."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        self._format_json = ops.format_to_json(spec.format)

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for every format whose rows decode independently, on every device."""
        return None if isinstance(spec.format, GroupFormat) else f"{spec.format.name} has a kernel of its own."

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        if is_traced(x):
            return TraceKernel(self.spec, self.tensors, self._format_json).apply(x)
        format, stored, columns = self.spec.format, self.tensors["codes"], self.spec.shape[1]
        params = format.unpack_params(self.tensors, self.spec.shape)
        decode = row_decoder(self.spec, params, lambda rows: format.unpack_codes(stored[rows], columns))
        return matmul_by_tiles(self.spec, decode, x)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        if is_traced(ids):
            return decode_rows(self.spec, self.tensors, self._format_json, ids)
        return super().rows(ids)


def row_decoder(spec: KernelSpec, params: Params, codes: Callable[[slice], Tensor]) -> RowDecoder:
    """Return a function that decodes rows of W^.

    Args:
        spec: The matrix.
        params: Its unpacked parameters.
        codes: Returns the codes of some rows, (rows, codes per row).
    """

    def decode(rows: slice) -> Tensor:
        tile = {k: v if v.shape[0] == 1 else v[rows] for k, v in params.items()}
        return spec.format.dequantize(codes(rows), tile, (rows.stop - rows.start, spec.shape[1]))

    return decode


def row_tiles(shape: tuple[int, int]) -> list[slice]:
    """Return the rows of a matrix in tiles that are decoded at a time."""
    rows, columns = shape
    step = max(1, _TILE // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def matmul_by_tiles(spec: KernelSpec, decode: RowDecoder, x: Tensor) -> Tensor:
    """Compute x W^^T with W^ decoded a tile at a time.

    Args:
        spec: The matrix.
        decode: Decodes rows; the next call may overwrite its result.
        x: Inputs (..., in).

    Returns:
        Outputs (..., out) in the type of x.
    """
    rows, columns = spec.shape
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    tiles = row_tiles(spec.shape)
    if len(tiles) == 1:
        W = decode(tiles[0]).to(x.dtype)
        return torch.nn.functional.linear(x, W.clone() if needs_grad else W)
    if needs_grad or is_traced(x):  # both keep every tile
        return torch.cat([torch.nn.functional.linear(x, decode(tile).to(x.dtype).clone()) for tile in tiles], -1)
    tokens, out = x.reshape(-1, columns), torch.empty(x[..., 0].numel(), rows, dtype=x.dtype, device=x.device)
    for tile in tiles:
        torch.mm(tokens, decode(tile).to(x.dtype).T, out=out[:, tile])  # into its place, without a copy
    return out.view(*x.shape[:-1], rows)


class TraceKernel(Kernel):
    """The packed tensors unchanged, for traces, which cannot repack them. It is not registered."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], format_json: str) -> None:
        """Keep the packed tensors.

        Args:
            spec: The matrix.
            tensors: Its packed tensors by name.
            format_json: `ops.format_to_json` of the format, which a trace cannot compute.
        """
        self.spec, self.tensors, self.format_json = spec, tensors, format_json

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None: every matrix is supported."""
        return None

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        if isinstance(self.spec.format, GroupFormat):
            return matmul_by_tiles(self.spec, self._decode, x)
        return torch.nn.functional.linear(x, self._decode(slice(0, self.spec.shape[0])).to(x.dtype))

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        return decode_rows(self.spec, self.tensors, self.format_json, ids)

    def _decode(self, rows: slice) -> Tensor:
        return self.rows(torch.arange(rows.start, rows.stop, device=self.spec.device))


def decode_rows(spec: KernelSpec, tensors: dict[str, Tensor], format_json: str, ids: Tensor) -> Tensor:
    """Decode rows of W^ by an operator that traces can record.

    Args:
        spec: The matrix.
        tensors: Its packed tensors by name.
        format_json: `ops.format_to_json` of the format.
        ids: int64 (n,), the rows.

    Returns:
        fp32 (n, in).
    """
    ordered = [tensors[name] for name in spec.format.layout(spec.shape)]
    return ops.packed_rows(ids, ordered, format_json, list(spec.shape))
