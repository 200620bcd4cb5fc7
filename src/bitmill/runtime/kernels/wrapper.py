"""Base of the kernels of wrappers: a kernel for the inner format, and the tensors of the wrapper itself."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from bitmill.formats import Wrapper
from bitmill.runtime.kernels.base import Kernel, KernelSpec, choose_kernel


class WrapperKernel(Kernel):
    """A kernel around `inner`, the kernel chosen for the inner format; `own` are the wrapper's parts as stored."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], inner: KernelSpec) -> None:
        """Split the tensors between the wrapper and the inner kernel.

        Args:
            spec: The matrix.
            tensors: Its packed tensors by name.
            inner: The matrix of the inner format.
        """
        assert isinstance(spec.format, Wrapper)
        names = {part.name for part in spec.format.own_parts(spec.shape)}
        self.spec = spec
        self.own = {name: tensor for name, tensor in tensors.items() if name in names}
        rest = {name: tensor for name, tensor in tensors.items() if name not in names}
        self.inner = choose_kernel(inner)(inner, rest)
        self.tolerance = self.inner.tolerance  # type: ignore[misc]

    def reading_prompt(self) -> AbstractContextManager[None]:
        """Return the context of the inner kernel."""
        return self.inner.reading_prompt()

    def output_error(self, W: Tensor) -> Tensor:
        """Return the error of the inner kernel, whose rows have about the norms of W's."""
        return self.inner.output_error(W)

    def effective_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs that the matrix multiplies in place of x, as its format says."""
        format = self.spec.format
        return format.effective_inputs(x, self.own_params()) if format.quantizes_inputs else x

    def own_params(self) -> dict[str, Tensor]:
        """Return the parts of this wrapper and of those inside it, unpacked."""
        assert isinstance(self.spec.format, Wrapper)
        parts = self.spec.format.own_parts(self.spec.shape)
        inner = self.inner.own_params() if isinstance(self.inner, WrapperKernel) else {}
        return {**inner, **{part.name: part.unpack(self.own[part.name]) for part in parts}}

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The inner kernel's tensors and the wrapper's own."""
        return {**self.inner.tensors, **self.own}

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors."""
        return {**self.inner.restore(), **self.own}
