"""The reference kernel: decode a tile of rows, multiply, forget it. Right everywhere, fast nowhere.

Never more than one tile of the float weight exists, so a model runs in its packed size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec

# Weights decoded at a time: 1 M are 4 MB in fp32, about a second-level cache.
_TILE = 1 << 20


@KERNELS.register("reference")
class Reference(Kernel):
    """Decode by tiles of rows and multiply with torch."""

    priority = 0

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Every format whose rows decode apart, on every device."""
        return None if isinstance(spec.format, GroupFormat) else f"{spec.format.name} has a kernel of its own."

    @staticmethod
    def apply(spec: KernelSpec, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        rows, columns = spec.shape
        format = spec.format
        params = format.unpack_params(tensors, spec.shape)
        out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
        step = max(1, _TILE // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            codes = format.unpack_codes(tensors["codes"][start:stop], columns)
            tile = {k: v if v.shape[0] == 1 else v[start:stop] for k, v in params.items()}
            W = format.dequantize(codes, tile, (stop - start, columns))
            out[..., start:stop] = torch.nn.functional.linear(x, W.to(x.dtype))
        return out
