"""Kernels: products with packed matrices; the fastest that supports a matrix is chosen."""

from bitmill.runtime.kernels.base import Kernel, KernelSpec, choose_kernel

__all__ = ["Kernel", "KernelSpec", "choose_kernel"]
