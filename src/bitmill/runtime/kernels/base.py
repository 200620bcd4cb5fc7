"""The contract of a kernel, and how one is chosen.

Law (tests/conformance/test_kernels.py): apply equals decode + matmul, on odd shapes and ragged groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import Format
from bitmill.registry import Registry

KERNELS: Registry[type[Kernel]] = Registry("kernel", "bitmill.runtime.kernels")


@dataclass(frozen=True)
class KernelSpec:
    """What is asked of a kernel: W^ (out, in) in `format`, applied on `device`."""

    format: Format
    shape: tuple[int, int]
    device: torch.device


class Kernel(ABC):
    """Computes x @ W^.T from packed tensors."""

    priority: ClassVar[int] = 0  # the highest that supports a layer serves it

    @staticmethod
    @abstractmethod
    def supports(spec: KernelSpec) -> str | None:
        """None for yes, or one sentence that says why not."""

    @staticmethod
    @abstractmethod
    def apply(spec: KernelSpec, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x; `tensors` as named by `format.layout`."""


def choose_kernel(spec: KernelSpec) -> type[Kernel]:
    """The kernel of highest priority that supports `spec`. Raises RecipeError with every reason if none does."""
    reasons = []
    for name, kernel in sorted(KERNELS.items(), key=lambda item: -item[1].priority):
        reason = kernel.supports(spec)
        if reason is None:
            return kernel
        reasons.append(f"{name}: {reason}")
    raise RecipeError(f"No kernel can run {spec.format!r} on {spec.device}: {'; '.join(reasons)}.")
