"""Dense plus sparse: the inner format's kernel, and a product with the few entries beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import Wrapper
from bitmill.numerics.sparse import places
from bitmill.runtime.kernels.around import Around
from bitmill.runtime.kernels.base import KERNELS, KernelSpec

_PARTS = ("sparse_values", "sparse_columns", "sparse_counts")

# Products held at a time: 1 M are 4 MB in fp32.
_TILE = 1 << 20


@KERNELS.register("sum")
class SumKernel(Around):
    """y = x inner^T, then x[column] * value added to y[row] for every entry."""

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Formats that store entries beside an inner format which some kernel runs."""
        if isinstance(spec.format, Wrapper):
            own = tuple(part.name for part in spec.format.own_parts(spec.shape))
            if own == _PARTS:
                return None
        return f"{spec.format.name} stores no sparse entries."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Wrapper)
        super().__init__(spec, tensors, KernelSpec(spec.format.inner, spec.shape, spec.device))

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out). The entries are added in fp32, as many tokens at a time as memory allows."""
        y = self.inner.apply(x)
        rows, columns = places(self.own["sparse_counts"], self.own["sparse_columns"])
        values = self.own["sparse_values"].to(torch.float32)
        tokens, out = x.reshape(-1, self.spec.shape[1]), y.reshape(-1, self.spec.shape[0])
        step = max(1, _TILE // max(1, len(values)))
        for start in range(0, tokens.shape[0], step):
            cut = slice(start, start + step)
            products = tokens[cut, columns].to(torch.float32) * values
            added = torch.zeros(products.shape[0], self.spec.shape[0], device=x.device)
            added.index_add_(1, rows, products)
            out[cut] += added.to(y.dtype)
        return out.reshape(y.shape)
