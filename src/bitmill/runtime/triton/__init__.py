"""Triton twins of the kernels, for GPUs. One file per kernel; `runtime.kernels.triton` chooses among them.

Triton is optional: nothing here is imported before `available.why_not` has found it. The modules know layouts,
never formats: what a format's tensors become is said in `runtime.kernels.triton`.

With TRITON_INTERPRET=1 in the environment before Triton is imported the same kernels run on the CPU, slowly;
that is how they are tested where there is no GPU.
"""
