"""Kernels, fastest first; each says whether it can serve a layer, or why not."""

from bitmill.runtime.kernels.base import Kernel, KernelSpec, choose_kernel

__all__ = ["Kernel", "KernelSpec", "choose_kernel"]
