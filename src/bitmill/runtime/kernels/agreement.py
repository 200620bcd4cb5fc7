"""Compare the products of a kernel with decode and matmul.

A few tokens and many take different paths through most kernels (`kernels.compiled`, `triton.available`), so both
are compared, on the device of the kernel; expected products are computed on the CPU. Inputs are Gaussian and
seeded. Each output must be within 6 times the error that its row may have (`Kernel.output_error`), and all of
them together within twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.runtime.kernels.base import Kernel, KernelSpec, choose_kernel
from bitmill.runtime.kernels.compiled import MAX_TOKENS
from bitmill.runtime.triton import available

TOKENS = (1, MAX_TOKENS + 1)
TOKENS_OF_GPU = (*TOKENS, available.MAX_TOKENS + 1)
_ROW, _ALL = 6.0, 2.0
_MANY = 1e-3  # error of many tokens in fixed point, relative to the output
_FLOOR = 1e-3  # of the mean error: rows of zeros, and sums in fp32
_LOOKED_UP = 16  # rows


def disagreement(spec: KernelSpec, tensors: dict[str, Tensor], W: Tensor) -> str | None:
    """Compare the kernel that runs a matrix with the decoded matrix.

    Args:
        spec: The matrix.
        tensors: Its packed tensors by name, on `spec.device`; the kernel takes them over.
        W: The decoded matrix, fp32 (out, in), on the CPU.

    Returns:
        None, or what differs, as part of a sentence.
    """
    kernel = choose_kernel(spec)(spec, tensors)
    for tokens in TOKENS if spec.device.type == "cpu" else TOKENS_OF_GPU:
        error = relative_error(kernel, W, tokens)
        if not error <= 1:  # also where it is NaN
            return f"products of {tokens} token{'s' * (tokens > 1)} are {error:.3g} times their tolerance apart"
    if isinstance(spec.format, GroupFormat):
        ids = torch.linspace(0, len(W) - 1, _LOOKED_UP).long()
        if not torch.equal(kernel.rows(ids.to(spec.device)).cpu(), W[ids]):
            return "rows that are looked up differ"
    return None


@torch.no_grad()
def relative_error(kernel: Kernel, W: Tensor, tokens: int) -> float:
    """Return the error of a kernel's products relative to its tolerance: the largest of a row, or of all rows.

    Args:
        kernel: The kernel.
        W: The matrix as the format decodes it, fp32 (out, in), on the CPU.
        tokens: Number of inputs.
    """
    x = torch.randn(tokens, W.shape[1], generator=torch.Generator().manual_seed(tokens))
    device = kernel.spec.device
    expected = kernel.effective_inputs(x.to(device)).cpu() @ W.T
    error = (kernel.apply(x.to(device)).cpu() - expected).double().abs()
    may = kernel.output_error(W.to(device)).cpu().double()
    if tokens > MAX_TOKENS:
        may = may.maximum(_MANY * W.norm(dim=1).double())
    may = may + _FLOOR * may.mean() + 1e-100  # of nothing but zeros
    together = error.norm() / (tokens**0.5 * may.norm())
    worst = torch.stack([(error / may).amax() / _ROW, together / _ALL])
    return float(worst.amax() if bool(torch.isfinite(worst).all()) else torch.inf)
