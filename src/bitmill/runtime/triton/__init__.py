"""Triton kernels for GPUs, one file each; `runtime.kernels.triton` chooses among them by the format of a layer.

Triton is optional: the kernel modules are imported only after `available.unsupported_reason` has returned None.
They are written for layouts of tensors, not for formats; `runtime.kernels.triton` turns the one into the other.

With TRITON_INTERPRET=1 in the environment before Triton is imported the kernels run on the CPU, slowly, for tests
on machines without a GPU.
"""
