"""The contract of a kernel, and how one is chosen.

Law (tests/conformance/test_kernels.py): apply equals decode + matmul within the kernel's `tolerance`, on odd
shapes and ragged groups; restore gives back what was packed, bit by bit.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
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
    """What is asked of a kernel: W^ (out, in) in `format`, applied on `device`."""

    format: Format
    shape: tuple[int, int]
    device: torch.device


class Kernel(ABC):
    """Computes x @ W^.T for one matrix.

    A kernel takes over the packed tensors of `format.layout`, lays them out as it likes, once, and can give them
    back. `tensors` is all it holds, so that memory can be counted.
    """

    priority: ClassVar[int] = 0  # the highest that supports a layer serves it
    tolerance: ClassVar[float] = 1e-5  # |y - x W^^T| / |x W^^T| that fp32 inputs may show

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec, self.tensors = spec, dict(tensors)

    @staticmethod
    @abstractmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """None for yes, or one sentence that says why not."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x."""

    def step_linear(self) -> Any:
        """The matrix as the compiled decode step multiplies with it (csrc/step); None where only torch can."""
        return None

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors, as they were given."""
        return self.tensors

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,), as `format.dequantize_rows` gives them: fp32 (n, in).

        Kernels that lay codes out anew override it, for a cost of those rows alone.
        """
        assert isinstance(self.spec.format, GroupFormat)
        return self.spec.format.dequantize_rows(self.restore(), self.spec.shape, ids)


def choose_kernel(spec: KernelSpec) -> type[Kernel]:
    """The kernel of highest priority that supports `spec`, or the one that BITMILL_KERNEL names where it does.

    Raises RecipeError with every reason if none does.
    """
    forced = os.environ.get("BITMILL_KERNEL")
    if forced:
        KERNELS.get(forced)  # an unknown name is an error
    reasons = []
    for name, kernel in sorted(KERNELS.items(), key=lambda item: (item[0] != forced, -item[1].priority)):
        reason = kernel.unsupported_reason(spec)
        if reason is None:
            return kernel
        reasons.append(f"{name}: {reason}")
    raise RecipeError(f"No kernel can run {spec.format!r} on {spec.device}: {'; '.join(reasons)}.")
