"""The reference kernel: decode a tile of rows, multiply, forget it. Right everywhere, fast nowhere.

Never more than one tile of the float weight exists, so a model runs in its packed size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec

# Weights decoded at a time: 1 M are 4 MB in fp32, about a second-level cache.
_TILE = 1 << 20


@KERNELS.register("reference")
class Reference(Kernel):
    """Decode by tiles of rows and multiply with torch."""

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Every format whose rows decode apart, on every device."""
        return None if isinstance(spec.format, GroupFormat) else f"{spec.format.name} has a kernel of its own."

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        format, stored, columns = self.spec.format, self.tensors["codes"], self.spec.shape[1]
        params = format.unpack_params(self.tensors, self.spec.shape)
        weights = decoded(self.spec, params, lambda rows: format.unpack_codes(stored[rows], columns))
        return by_tiles(self.spec, weights, x)


def decoded(spec: KernelSpec, params: Params, codes: Callable[[slice], Tensor]) -> Callable[[slice], Tensor]:
    """Some rows of W^ as a function, from a function that gives their codes, (rows, codes a row)."""

    def weights(rows: slice) -> Tensor:
        tile = {k: v if v.shape[0] == 1 else v[rows] for k, v in params.items()}
        return spec.format.dequantize(codes(rows), tile, (rows.stop - rows.start, spec.shape[1]))

    return weights


def by_tiles(spec: KernelSpec, weights: Callable[[slice], Tensor], x: Tensor) -> Tensor:
    """x W^^T with W^ decoded a tile at a time.

    weights: gives some of its rows, fp32, in memory that the next call may overwrite.
    """
    rows, columns = spec.shape
    step = max(1, _TILE // columns)
    learns = torch.is_grad_enabled() and x.requires_grad
    if step >= rows:
        W = weights(slice(0, rows)).to(x.dtype)
        return torch.nn.functional.linear(x, W.clone() if learns else W)
    tokens, out = x.reshape(-1, columns), torch.empty(x[..., 0].numel(), rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        cut = slice(start, min(start + step, rows))
        W = weights(cut).to(x.dtype)
        if learns:
            out[:, cut] = torch.nn.functional.linear(tokens, W.clone())
        else:
            torch.mm(tokens, W.T, out=out[:, cut])  # where it belongs, without a copy
    return out.view(*x.shape[:-1], rows)
