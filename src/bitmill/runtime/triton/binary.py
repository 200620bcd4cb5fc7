"""binary_gemv and binary_gemm: y = x W^^T for sums of signed magnitudes.

    W^[r, k] = beta[r, g] + sum_i alpha[r, g, i] * b_i[r, k],  b_i in {-1, +1}
    y[r]     = sum_g ( (beta - sum_i alpha_i) * sum_k x_k + 2 * sum_i alpha_i * sum_{k: b_i = +1} x_k )

They read planes in lanes (`lanes`), prepared once: word i of a lane holds bit i of its 32 codes. The inner sums of
binary_gemv then cost one mask and one multiply-add a bit, without unpacking codes, and no table of 2**bits levels
a group is built or read, which in small groups are more than the magnitudes. Tables of sums of the inputs for
several signs at a time, as in LUT-GEMM, would need another launch, or shared memory that Triton does not expose.

One token: binary_gemv, in fp32. More: binary_gemm decodes weights in the type of the inputs for the matrix units.

With m_rk = |beta| + sum_i |alpha_i|, and before y is rounded to the type of x,

    binary_gemv   |error of y_r| <= 2^-17 * sum_k |x_k| * m_rk
    binary_gemm   |error of y_r| <= (2^-24 * (columns + 64) + u) * sum_k |x_k| * m_rk, u as in `lut`
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitmill.runtime.ops import Operator
from bitmill.runtime.triton.launch import multiply
from bitmill.runtime.triton.lut import gemm_launch, gemv_launch, lane_constants
from bitmill.runtime.triton.tiles import of_group, places, words_of


@triton.jit(do_not_specialize_on_alignment=["x", "codes", "alphas", "betas"])  # as in lut_gemv
def binary_gemv(
    x, y, codes, alphas, betas, count,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    PER_GROUP: tl.constexpr, STRIDE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute y (count,) = W^ x, `ROWS` rows per program, `BLOCK` lanes at a time; alphas (rows|1, groups|1,
    bits).
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, LANES, BLOCK):
        lanes = (start + tl.arange(0, BLOCK))[None, :]
        inside = (rows < count) & (lanes < LANES)
        words = words_of(codes, rows, lanes, inside, BITS, LANES)
        groups, offset = places(lanes, PER_GROUP, STRIDE)
        ones = tl.zeros([1, BLOCK], tl.float32)
        sums = ()
        for _ in tl.static_range(BITS):
            sums = sums + (tl.zeros([ROWS, BLOCK], tl.float32),)  # noqa: RUF005
        for i in tl.static_range(32):
            column = groups * WIDTH + offset + i * STRIDE
            real = (lanes < LANES) & (offset + i * STRIDE < WIDTH) & (column < COLUMNS)
            v = tl.load(x + column, mask=real, other=0).to(tl.float32)
            ones += v
            v *= 2.0 ** (80 - i if i < 23 else 89 - i)
            added = ()
            for plane in tl.static_range(BITS):
                bit = words[plane] & (1 << i) if i < 23 else (words[plane] >> 9) & (1 << (i - 9))
                added = added + (tl.fma(bit.to(tl.float32, bitcast=True), v, sums[plane]),)  # noqa: RUF005
            sums = added
        level = tl.zeros([ROWS, BLOCK], tl.float32)  # of a weight with all bits 0
        if betas is not None:
            level += of_group(betas, rows, groups, inside, count, BETA).to(tl.float32)
        for plane in tl.static_range(BITS):
            alpha = of_group(alphas + plane, rows, groups, inside, count, ALPHA, BITS)
            level -= alpha.to(tl.float32)
            total += (alpha.to(tl.float32) * 2.0**70) * sums[plane]
        total += level * ones
    tl.store(y + rows, tl.sum(total, 1)[:, None].to(y.dtype.element_ty), mask=rows < count)


@triton.jit
def binary_gemm(
    x, y, codes, alphas, betas, count, tokens,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    PER_GROUP: tl.constexpr, STRIDE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute y (tokens, count) = x W^^T with the tiles of lut_gemm."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    which = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, LANES, BLOCK):
        lanes = (start + tl.arange(0, BLOCK))[None, :]
        inside = (rows < count) & (lanes < LANES)
        words = words_of(codes, rows, lanes, inside, BITS, LANES)
        groups, _ = places(lanes, PER_GROUP, STRIDE)
        alpha = ()
        for plane in tl.static_range(BITS):
            part = of_group(alphas + plane, rows, groups, inside, count, ALPHA, BITS)
            alpha = alpha + (part.to(tl.float32),)  # noqa: RUF005
        level = tl.zeros([ROWS, BLOCK], tl.float32)
        if betas is not None:
            level += of_group(betas, rows, groups, inside, count, BETA).to(tl.float32)
        down = (start + tl.arange(0, BLOCK))[:, None]
        down_groups, down_offset = places(down, PER_GROUP, STRIDE)
        for i in tl.static_range(32):
            column = down_groups * WIDTH + down_offset + i * STRIDE
            real = (down < LANES) & (down_offset + i * STRIDE < WIDTH) & (column < COLUMNS)
            v = tl.load(x + which.to(tl.int64) * COLUMNS + column, mask=real & (which < tokens), other=0)
            weight = level
            for plane in tl.static_range(BITS):
                weight += tl.where(words[plane] & (1 << i) != 0, alpha[plane], -alpha[plane])
            weight = weight.to(v.dtype)
            if WIDE:
                weight, v = weight.to(tl.float32), v.to(tl.float32)
            total = tl.dot(weight, v, total, input_precision="ieee")
    at = y + which.to(tl.int64) * count + rows
    tl.store(at, total.to(y.dtype.element_ty), mask=(rows < count) & (which < tokens))


_SCHEMA = "Tensor codes, Tensor alphas, Tensor? betas, int[] plan"


def _triton_binary(x: Tensor, codes: Tensor, alphas: Tensor, betas: Tensor | None, plan: list[int]) -> Tensor:
    """Multiply x (tokens, in) to (tokens, out) in the type of x.

    codes   int32 (rows, bits, lanes), `lanes.to_planes`
    alphas  fp16 (rows|1, groups|1, bits)
    betas   fp16 (rows|1, groups|1)
    plan    rows, columns, columns of a group
    """
    rows, columns, width = plan
    constants = {
        **lane_constants(columns, width, codes),
        "ALPHA": tuple(alphas.shape[:2]),
        "BETA": (1, 1) if betas is None else tuple(betas.shape),
    }
    gemv, gemm = gemv_launch(binary_gemv, codes.shape[2]), gemm_launch(binary_gemm)
    return multiply(x, (codes, alphas, betas), rows, constants, gemv, gemm)


binary = Operator("triton_binary", _SCHEMA, _triton_binary, lambda x, *rest: rest[-1][0], device=None)
