"""The contract of a kernel, and the choice among kernels.

Law (tests/conformance/test_kernels.py): `apply` equals decode and matmul within the kernel's `tolerance`, on odd
shapes and ragged groups; `restore` returns the packed tensors bit by bit.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.config.registry import Registry
from bitmill.errors import RecipeError
from bitmill.formats import Format, GroupFormat

KERNELS: Registry[type[Kernel]] = Registry("kernel", "bitmill.runtime.kernels")


@dataclass(frozen=True)
class KernelSpec:
    """The matrix that a kernel multiplies with: W^ (out, in) in `format`, on `device`.

    exact: inputs are multiplied as they are, in fp32, whatever BITMILL_ACTIVATIONS says.
    """

    format: Format
    shape: tuple[int, int]
    device: torch.device
    exact: bool = False


class Kernel(ABC):
    """The product x @ W^.T with one quantized matrix.

    A kernel takes over the packed tensors of `format.layout`, may repack them once, and can restore them.
    `tensors` is everything it holds, so that memory can be counted.
    """

    priority: ClassVar[int] = 0  # among the kernels that support a layer the highest is chosen
    tolerance: ClassVar[float] = 1e-5  # of |y - x W^^T| / |x W^^T| for fp32 inputs

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        """Take over the packed tensors of a matrix.

        Args:
            spec: The matrix; `unsupported_reason` returns None for it.
            tensors: Its packed tensors by name, on `spec.device`.
        """
        self.spec, self.tensors = spec, dict(tensors)

    @staticmethod
    @abstractmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None if the kernel supports the matrix, or one sentence with the reason why not."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out), in the type of x."""

    def effective_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs that the matrix multiplies in place of x, see `Format.effective_inputs`."""
        return x

    def output_error(self, W: Tensor) -> Tensor:
        """Return the RMS error that outputs may have for Gaussian inputs of variance 1.

        Args:
            W: The decoded matrix, fp32 (out, in).

        Returns:
            fp32 (out,).
        """
        return self.tolerance * W.norm(dim=1)

    def step_linear(self) -> Any:
        """Return the matrix for the compiled decode step (csrc/step), or None if only torch multiplies with it."""
        return None

    def reading_prompt(self) -> AbstractContextManager[None]:
        """Return a context in which `step_linear`'s matrix multiplies many tokens, if it can."""
        return nullcontext()

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, as they were given."""
        return self.tensors

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,), as `format.dequantize_rows` does: fp32 (n, in).

        Kernels that repack codes override it, so that only these rows are decoded.
        """
        assert isinstance(self.spec.format, GroupFormat)
        return self.spec.format.dequantize_rows(self.restore(), self.spec.shape, ids)


def choose_kernel(spec: KernelSpec) -> type[Kernel]:
    """Return the kernel of highest priority that supports the matrix.

    The kernel that BITMILL_KERNEL names is preferred if it supports the matrix.

    Raises:
        RecipeError: with the reasons of all kernels if none supports it.
    """
    forced = os.environ.get("BITMILL_KERNEL")
    if forced:
        KERNELS.get(forced)  # raises for an unknown name
    reasons = []
    for name, kernel in sorted(KERNELS.items(), key=lambda item: (item[0] != forced, -item[1].priority)):
        reason = kernel.unsupported_reason(spec)
        if reason is None:
            return kernel
        reasons.append(f"{name}: {reason}")
    raise RecipeError(f"No kernel can run {spec.format!r} on {spec.device}: {'; '.join(reasons)}.")
