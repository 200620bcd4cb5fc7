"""Base of the kernels of wrappers: the inner format's kernel, and the wrapper's own tensors."""

from __future__ import annotations

from torch import Tensor

from bitmill.formats import Wrapper
from bitmill.runtime.kernels.base import Kernel, KernelSpec, choose_kernel


class WrapperKernel(Kernel):
    """Holds `inner`, a kernel of its own for the inner format, and `own`, the wrapper's parts as stored."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], inner: KernelSpec) -> None:
        assert isinstance(spec.format, Wrapper)
        names = {part.name for part in spec.format.own_parts(spec.shape)}
        self.spec = spec
        self.own = {name: tensor for name, tensor in tensors.items() if name in names}
        rest = {name: tensor for name, tensor in tensors.items() if name not in names}
        self.inner = choose_kernel(inner)(inner, rest)
        self.tolerance = self.inner.tolerance  # type: ignore[misc]

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The inner kernel's and the wrapper's own."""
        return {**self.inner.tensors, **self.own}

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors."""
        return {**self.inner.restore(), **self.own}
