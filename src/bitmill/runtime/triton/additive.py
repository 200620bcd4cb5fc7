"""additive_gemv and additive_gemm: y = x W^^T for blocks of eight columns that are sums of vectors.

    W^[r, 8 j + d] = scale[r, g] * sum_m codebooks[m, code[r, j, m], d]

They read the packed layout as it is: a code stands for eight weights, so that finding it in the stream of bits, with shifts
that differ from code to code, costs little beside them, and the codebooks lie in the cache. A program serves some rows
and all their blocks: outputs are written once, by one program, and equal inputs give equal bits.

One token: additive_gemv, in fp32. More: additive_gemm decodes weights in the type of the inputs for the matrix units.

    additive_gemv   |error of y_r| <= 2^-15 * sum_k |x_k| * scale_rk * sum_m |codebooks[m, code, d]|
    additive_gemm   |error of y_r| <= (2^-24 * (columns + 32) + u) * the same sum, u 2^-8 for bf16 inputs, 2^-11 for fp16, 0 for
                    fp32
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill.runtime.triton.available import MOST_TOKENS, widens
from bitmill.runtime.triton.tiles import of_group

GEMV_ROWS, GEMV_BLOCKS = 4, 32
GEMM_ROWS, GEMM_BLOCKS = 32, 8


@triton.jit
def _weights(
    codes, books, scales, rows, blocks, inside,
    WORDS: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr, PER_GROUP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Some rows' blocks, fp32 (rows, blocks, 8)."""
    d = tl.arange(0, 8)[None, None, :]
    total = tl.zeros([inside.shape[0], inside.shape[1], 8], tl.float32)
    for m in tl.static_range(BOOKS):
        bit = (blocks * BOOKS + m) * BITS
        at = codes + rows.to(tl.int64) * WORDS + bit // 32
        code = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (bit % 32).to(tl.uint32)
        if 32 % BITS != 0:  # a code may end in the next word
            cut = inside & (bit % 32 + BITS > 32)
            above = tl.load(at + 1, mask=cut, other=0).to(tl.uint32, bitcast=True)
            code |= above << ((32 - bit % 32) % 32).to(tl.uint32)
        code = (code & ((1 << BITS) - 1)).to(tl.int32) + (m << BITS)
        total += tl.load(books + code[:, :, None] * 8 + d).to(tl.float32)
    scale = of_group(scales, rows, blocks // PER_GROUP, inside, SCALE).to(tl.float32)
    return total * scale[:, :, None]


@triton.jit
def additive_gemv(
    x, y, codes, books, scales, count,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y (count,) = W^ x; `ROWS` rows a program, `STEP` blocks at a time. PER_GROUP: blocks of a group."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, STEP], tl.float32)
    for start in range(0, BLOCKS, STEP):
        blocks = start + tl.arange(0, STEP)
        inside = (rows < count) & (blocks < BLOCKS)[None, :]
        weights = _weights(
            codes, books, scales, rows, blocks[None, :], inside, WORDS, BITS, BOOKS, PER_GROUP, SCALE
        )
        column = blocks[:, None] * 8 + tl.arange(0, 8)[None, :]
        v = tl.load(x + column, mask=column < COLUMNS, other=0).to(tl.float32)
        total += tl.sum(weights * v[None, :, :], 2)
    tl.store(y + rows, tl.sum(total, 1)[:, None].to(y.dtype.element_ty), mask=rows < count)


@triton.jit
def additive_gemm(
    x, y, codes, books, scales, count, tokens,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y (tokens, count) = x W^^T; `ROWS` rows and `TOKENS` tokens a program, `STEP` blocks at a time.

    WIDE: multiply in fp32, for the sake of Triton's interpreter.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    which = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, BLOCKS, STEP):
        blocks = (start + tl.arange(0, STEP))[None, :]
        inside = (rows < count) & (blocks < BLOCKS)
        weights = _weights(codes, books, scales, rows, blocks, inside, WORDS, BITS, BOOKS, PER_GROUP, SCALE)
        column = (start * 8 + tl.arange(0, STEP * 8))[:, None]
        v = tl.load(
            x + which.to(tl.int64) * COLUMNS + column, mask=(column < COLUMNS) & (which < tokens), other=0
        )
        weights = tl.reshape(weights, [ROWS, STEP * 8]).to(v.dtype)
        if WIDE:
            weights, v = weights.to(tl.float32), v.to(tl.float32)
        total = tl.dot(weights, v, total, input_precision="ieee")
    at = y + which.to(tl.int64) * count + rows
    tl.store(at, total.to(y.dtype.element_ty), mask=(rows < count) & (which < tokens))


_SCHEMA = "(Tensor x, Tensor codes, Tensor books, Tensor scales, int[] plan) -> Tensor"


def run_additive(x: Tensor, codes: Tensor, books: Tensor, scales: Tensor, plan: list[int]) -> Tensor:
    """x (tokens, in) to (tokens, out) in the type of x.

    codes   int32 (rows, words), packed
    books   fp16 (codebooks, 2**bits, 8)
    scales  fp16 (rows|1, groups|1)
    plan    rows, columns, columns of a group, bits
    """
    rows, columns, width, bits = plan
    tokens = x.shape[0]
    y = x.new_empty(tokens, rows)
    constants = {
        "COLUMNS": columns,
        "BLOCKS": triton.cdiv(columns, 8),
        "WORDS": codes.shape[1],
        "BITS": bits,
        "BOOKS": books.shape[0],
        "PER_GROUP": width // 8,
        "SCALE": tuple(scales.shape),
    }
    x = x.contiguous()
    if tokens == 1:
        grid = (triton.cdiv(rows, GEMV_ROWS),)
        sizes = {"ROWS": GEMV_ROWS, "STEP": GEMV_BLOCKS}
        additive_gemv[grid](x, y, codes, books, scales, rows, **constants, **sizes, num_warps=4)
    else:
        size = max(16, min(MOST_TOKENS, triton.next_power_of_2(tokens)))
        grid = (triton.cdiv(rows, GEMM_ROWS), triton.cdiv(tokens, size))
        sizes = {"ROWS": GEMM_ROWS, "STEP": GEMM_BLOCKS, "TOKENS": size, "WIDE": widens(x)}
        additive_gemm[grid](x, y, codes, books, scales, rows, tokens, **constants, **sizes, num_warps=4)
    return y


additive = torch.library.custom_op("bitmill::triton_additive", run_additive, mutates_args=(), schema=_SCHEMA)


@additive.register_fake
def _(x, codes, books, scales, plan):
    return x.new_empty(x.shape[0], plan[0])
