"""Dense plus sparse: the inner format's kernel, and a product with the sparse entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.formats import Wrapper
from bitmill.native import native
from bitmill.numerics.sparse import from_index, places
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import may_compile, uses_gemv
from bitmill.runtime.kernels.wrapper import WrapperKernel

_PARTS = ("sparse_values", "sparse_columns", "sparse_counts")

# Products held at a time: 1 M are 4 MB in fp32.
_TILE = 1 << 20


@KERNELS.register("sum")
class SumKernel(WrapperKernel):
    """y = x inner^T, then x[column] * value added to y[row] for every entry."""

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for formats that add sparse entries to an inner format, or the reason."""
        if isinstance(spec.format, Wrapper):
            own = tuple(part.name for part in spec.format.own_parts(spec.shape))
            if own == _PARTS:
                return None
        return f"{spec.format.name} stores no sparse entries."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        assert isinstance(spec.format, Wrapper)
        super().__init__(spec, tensors, KernelSpec(spec.format.inner, spec.shape, spec.device))
        self._entries: tuple[Tensor, Tensor, Tensor] | None = None
        if may_compile(spec):
            starts = torch.zeros(spec.shape[0] + 1, dtype=torch.int64)
            torch.cumsum(from_index(self.own["sparse_counts"]), 0, out=starts[1:])
            columns = self.own["sparse_columns"].contiguous()
            if (
                not columns.numel() or int(from_index(columns).max()) < spec.shape[1]
            ):  # the compiled code does not check them
                values = self.own["sparse_values"].contiguous()
                self._entries = starts, columns.view(torch.uint8), values.view(torch.uint8)

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The inner kernel's, the entries, and the start of each row."""
        return {**super().tensors, **({} if self._entries is None else {"sparse_starts": self._entries[0]})}

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out). The entries are added in fp32."""
        if self._entries is not None and uses_gemv(x):
            wide = x.reshape(-1, self.spec.shape[1]).to(torch.float32)
            y = ops.sparse_add(self.effective_inputs(wide), self.inner.apply(wide), *self._entries)
            return y.to(x.dtype).view(*x.shape[:-1], self.spec.shape[0])
        return self._by_torch(self.effective_inputs(x), self.inner.apply(x))

    def step_linear(self) -> Any:
        """Return the inner kernel's matrix plus the entries, for the decode step."""
        if self._entries is None or self.spec.format.uncompiled_reason(self.spec.shape[1]) is not None:
            return None
        inner = self.inner.step_linear()
        return None if inner is None else native().sum_linear(inner, *self._entries)

    def _by_torch(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the entries' product to y, as many tokens at a time as memory allows."""
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
