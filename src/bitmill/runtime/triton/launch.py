"""Launch a pair of Triton kernels: gemv for one token, gemm for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bitmill.runtime.triton.available import MAX_TOKENS, needs_fp32_tiles


@dataclass(frozen=True)
class Launch:
    """Parameters of a launch: the kernel, rows of a program, compile-time sizes, and warps."""

    kernel: Any
    rows: int
    sizes: dict[str, int]
    warps: int


def multiply(
    x: Tensor, arguments: tuple[Any, ...], rows: int, constants: dict[str, Any], gemv: Launch, gemm: Launch
) -> Tensor:
    """Multiply x (tokens, in) with a matrix.

    Args:
        x: Inputs.
        arguments: Arguments of both kernels between y and the number of rows.
        rows: Rows of the matrix.
        constants: Compile-time arguments of both kernels.
        gemv: Launch for one token.
        gemm: Launch for more; its kernel also takes the number of tokens, TOKENS and WIDE.

    Returns:
        Outputs (tokens, rows) in the type of x.
    """
    x, tokens = x.contiguous(), x.shape[0]
    y = x.new_empty(tokens, rows)
    with torch.cuda.device_of(x):
        if tokens == 1:
            grid = (triton.cdiv(rows, gemv.rows), 1)
            sizes = {"ROWS": gemv.rows, **gemv.sizes}
            gemv.kernel[grid](x, y, *arguments, rows, **constants, **sizes, num_warps=gemv.warps)
        else:
            size = max(16, min(MAX_TOKENS, triton.next_power_of_2(tokens)))
            grid = (triton.cdiv(rows, gemm.rows), triton.cdiv(tokens, size))
            sizes = {"ROWS": gemm.rows, **gemm.sizes, "TOKENS": size, "WIDE": needs_fp32_tiles(x)}
            gemm.kernel[grid](x, y, *arguments, rows, tokens, **constants, **sizes, num_warps=gemm.warps)
    return y
