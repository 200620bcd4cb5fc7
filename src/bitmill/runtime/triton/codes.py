"""codes_gemm: many tokens of 8-bit integers or floats times a matrix of them, by the matrix units.

    y_tr = sum over steps s of scale_ts * size_rs * sum over columns c of s of (x_tc - zero_ts) w_rc

Sums of integers are exact in int32, for steps of up to 2^16 columns; those of floats are of fp32. Integers of
fewer bits multiply as 8-bit ones. Tested in Triton's interpreter only: on a GPU it has not run yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, TOKENS, BLOCK = 64, 64, 64


@triton.jit
def codes_gemm(
    x, y, w, scales, sizes, zeros, tokens, count,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute y (tokens, count) in fp32.

    Args:
        x, w: Codes (tokens, COLUMNS) and (count, COLUMNS), int8 or float8_e4m3fn.
        scales, sizes: fp32 (tokens, STEPS) and (count, STEPS).
        zeros: fp32 (tokens, STEPS), codes of the number 0; None for 0.
        STEP: Columns of a step.
        INTEGER: The codes are integers.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    which = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    x += which.to(tl.int64) * COLUMNS
    w += rows.to(tl.int64) * COLUMNS
    nothing: tl.constexpr = 0 if INTEGER else 0.0
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for s in range(STEPS):
        part = tl.zeros([TOKENS, ROWS], tl.int32 if INTEGER else tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        for start in range(0, STEP, BLOCK):
            inside = start + tl.arange(0, BLOCK)
            column = s * STEP + inside
            real = (inside < STEP) & (column < COLUMNS)
            a = tl.load(x + column[None, :], mask=real[None, :] & (which < tokens), other=nothing)
            b = tl.load(w + column[:, None], mask=real[:, None] & (rows < count), other=nothing)
            if INTEGER:
                part = tl.dot(a, b, part, out_dtype=tl.int32)
            else:  # 0: sums of the matrix units are rounded to fp32 at once
                part = tl.dot(a, b, part, max_num_imprecise_acc=0)
            if zeros is not None:
                sums += tl.sum(b.to(tl.float32), 0)
        scale = tl.load(scales + which * STEPS + s, mask=which < tokens, other=0)
        size = tl.load(sizes + rows * STEPS + s, mask=rows < count, other=0)
        found = part.to(tl.float32)
        if zeros is not None:
            found -= tl.load(zeros + which * STEPS + s, mask=which < tokens, other=0) * sums[None, :]
        total += scale * size * found
    tl.store(y + which.to(tl.int64) * count + rows, total, mask=(which < tokens) & (rows < count))


def multiply_codes(
    x: Tensor, scales: Tensor, w: Tensor, sizes: Tensor, step: int, zeros: Tensor | None = None
) -> Tensor:
    """Multiply codes of inputs with codes of a matrix.

    Args:
        x: int8 or float8_e4m3fn (tokens, in).
        scales: fp32 (tokens, steps), the sizes of a token's codes.
        w: (out, in), of the type of x.
        sizes: fp32 (out, steps), the sizes of a row's codes.
        step: Columns of a step.
        zeros: fp32 (tokens, steps), codes of the number 0; None for 0.

    Returns:
        fp32 (tokens, out).
    """
    (tokens, columns), rows = x.shape, len(w)
    y = torch.empty(tokens, rows, device=x.device)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(tokens, TOKENS))
    scales, sizes = scales.contiguous(), sizes.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    given = {"COLUMNS": columns, "STEP": step, "STEPS": -(-columns // step), "INTEGER": x.dtype == torch.int8}
    with torch.cuda.device_of(x):
        codes_gemm[grid](
            x.contiguous(), y, w.contiguous(), scales, sizes, zeros, tokens, rows, **given,
            ROWS=ROWS, TOKENS=TOKENS, BLOCK=BLOCK,
        )  # fmt: skip
    return y
