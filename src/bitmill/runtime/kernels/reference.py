"""The reference kernel: decode a tile of rows, multiply, forget it. Right everywhere, fast nowhere.

Never more than one tile of the float weight exists, so a model runs in its packed size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec

# Weights decoded at a time: 1 M are 4 MB in fp32, about a second-level cache.
_TILE = 1 << 20


@KERNELS.register("reference")
class Reference(Kernel):
    """Decode by tiles of rows and multiply with torch."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        self._text = ops.text_of(spec.format)

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Every format whose rows decode apart, on every device."""
        return None if isinstance(spec.format, GroupFormat) else f"{spec.format.name} has a kernel of its own."

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if ops.is_traced(x):
            return TraceKernel(self.spec, self.tensors, self._text).apply(x)
        format, stored, columns = self.spec.format, self.tensors["codes"], self.spec.shape[1]
        params = format.unpack_params(self.tensors, self.spec.shape)
        weights = decoded(self.spec, params, lambda rows: format.unpack_codes(stored[rows], columns))
        return matmul_by_tiles(self.spec, weights, x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,): fp32 (n, in)."""
        return decode_rows(self.spec, self.tensors, self._text, ids) if ops.is_traced(ids) else super().rows(ids)


def decoded(spec: KernelSpec, params: Params, codes: Callable[[slice], Tensor]) -> Callable[[slice], Tensor]:
    """Some rows of W^ as a function, from a function that gives their codes, (rows, codes a row)."""

    def weights(rows: slice) -> Tensor:
        tile = {k: v if v.shape[0] == 1 else v[rows] for k, v in params.items()}
        return spec.format.dequantize(codes(rows), tile, (rows.stop - rows.start, spec.shape[1]))

    return weights


def row_tiles(shape: tuple[int, int]) -> list[slice]:
    """The rows of a matrix in pieces that are decoded at a time."""
    rows, columns = shape
    step = max(1, _TILE // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def matmul_by_tiles(spec: KernelSpec, weights: Callable[[slice], Tensor], x: Tensor) -> Tensor:
    """x W^^T with W^ decoded a tile at a time.

    weights: gives some of its rows, fp32, in memory that the next call may overwrite.
    """
    rows, columns = spec.shape
    learns = torch.is_grad_enabled() and x.requires_grad
    keeps = learns or ops.is_traced(x)
    cuts = row_tiles(spec.shape)
    if len(cuts) == 1:
        W = weights(cuts[0]).to(x.dtype)
        return torch.nn.functional.linear(x, W.clone() if learns else W)
    if keeps:
        return torch.cat([torch.nn.functional.linear(x, weights(cut).to(x.dtype).clone()) for cut in cuts], -1)
    tokens, out = x.reshape(-1, columns), torch.empty(x[..., 0].numel(), rows, dtype=x.dtype, device=x.device)
    for cut in cuts:
        torch.mm(tokens, weights(cut).to(x.dtype).T, out=out[:, cut])  # where it belongs, without a copy
    return out.view(*x.shape[:-1], rows)


class TraceKernel(Kernel):
    """Packed tensors as they are, for traces: whoever traces cannot lay them out anew. Never registered."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], text: str) -> None:
        """text: `ops.text_of` the format, which no trace could make."""
        self.spec, self.tensors, self.text = spec, tensors, text

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Everything."""
        return None

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if isinstance(self.spec.format, GroupFormat):
            return matmul_by_tiles(self.spec, self.tile, x)
        return torch.nn.functional.linear(x, self.tile(slice(0, self.spec.shape[0])).to(x.dtype))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,): fp32 (n, in)."""
        return decode_rows(self.spec, self.tensors, self.text, ids)

    def tile(self, rows: slice) -> Tensor:
        """Some rows of W^."""
        return self.rows(torch.arange(rows.start, rows.stop, device=self.spec.device))


def decode_rows(spec: KernelSpec, tensors: dict[str, Tensor], text: str, ids: Tensor) -> Tensor:
    """Rows of W^, int64 (n,): fp32 (n, in), by an operator, from the packed tensors."""
    ordered = [tensors[name] for name in spec.format.layout(spec.shape)]
    return ops.packed_rows(ids, ordered, text, list(spec.shape))
