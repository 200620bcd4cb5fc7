"""additive_gemv and additive_gemm: y = x W^^T for blocks of eight columns that are sums of vectors.

    W^[r, 8 j + d] = scale[r, g] * sum_m codebooks[m, code[r, j, m], d]

They read the packed layout unchanged: a code represents eight weights, so that extracting it from the stream of
bits, with shifts that differ from code to code, costs little; the codebooks stay in the cache. A program computes
all blocks of some rows: an output is written once, by one program, and equal inputs give equal bits.

One token: additive_gemv, in fp32. More: additive_gemm decodes weights in the type of the inputs for the matrix
units.

With m_rk = scale * sum_m |codebooks[m, code, d]|, and before y is rounded to the type of x,

    additive_gemv   |error of y_r| <= 2^-18 * sum_k |x_k| * m_rk
    additive_gemm   |error of y_r| <= (2^-24 * (columns + 64) + u) * sum_k |x_k| * m_rk, u as in `lut`
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitmill.runtime.ops import Operator
from bitmill.runtime.triton.launch import Launch, multiply
from bitmill.runtime.triton.tiles import of_group

GEMV_ROWS, GEMV_BLOCKS = 8, 64
GEMM_ROWS, GEMM_BLOCKS = 32, 8


@triton.jit
def _sums(
    codes, books, rows, blocks, inside,
    WORDS: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
):  # fmt: skip
    """Return blocks before scaling, fp32 (R, S, 8), for rows (R, 1, 1) and blocks (1, S, 1)."""
    d = tl.arange(0, 8)[None, None, :]
    total = 0.0
    for m in tl.static_range(BOOKS):
        bit = (blocks * BOOKS + m) * BITS
        at = codes + rows.to(tl.int64) * WORDS + bit // 32
        code = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (bit % 32).to(tl.uint32)
        if 32 % BITS != 0:  # a code may end in the next word
            cut = inside & (bit % 32 + BITS > 32)
            above = tl.load(at + 1, mask=cut, other=0).to(tl.uint32, bitcast=True)
            code |= above << ((32 - bit % 32) % 32).to(tl.uint32)
        code = (code & ((1 << BITS) - 1)) | (m << BITS)
        vector = tl.load(books + (code * 8).to(tl.int64) + d).to(tl.float32)
        total += vector
    return total


@triton.jit
def additive_gemv(
    x, y, codes, books, scales, count,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute y (count,) = W^ x, `ROWS` rows per program, `STEP` of the blocks at a time."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    total = tl.zeros([ROWS, STEP, 1], tl.float32)
    for start in range(0, BLOCKS, STEP):
        blocks = (start + tl.arange(0, STEP))[None, :, None]
        inside = (rows < count) & (blocks < BLOCKS)
        sums = _sums(codes, books, rows, blocks, inside, WORDS, BITS, BOOKS)
        column = blocks * 8 + tl.arange(0, 8)[None, None, :]
        v = tl.load(x + column, mask=column < COLUMNS, other=0).to(tl.float32)
        scale = of_group(scales, rows, blocks // PER_GROUP, inside, count, SCALE).to(tl.float32)
        total += scale * tl.sum(sums * v, 2, keep_dims=True)
    out = tl.sum(tl.sum(total, 2), 1)
    where = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + where, out.to(y.dtype.element_ty), mask=where < count)


@triton.jit
def additive_gemm(
    x, y, codes, books, scales, count, tokens,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute y (tokens, count) = x W^^T, `ROWS` rows and `TOKENS` tokens per program, `STEP` blocks at a time.

    WIDE: multiply in fp32, which Triton's interpreter needs for bf16.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    which = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, BLOCKS, STEP):
        blocks = (start + tl.arange(0, STEP))[None, :, None]
        inside = (rows < count) & (blocks < BLOCKS)
        scale = of_group(scales, rows, blocks // PER_GROUP, inside, count, SCALE).to(tl.float32)
        weights = _sums(codes, books, rows, blocks, inside, WORDS, BITS, BOOKS) * scale
        column = (start * 8 + tl.arange(0, STEP * 8))[:, None]
        v = tl.load(x + which.to(tl.int64) * COLUMNS + column, mask=(column < COLUMNS) & (which < tokens), other=0)
        weights = tl.reshape(weights.to(v.dtype), [ROWS, STEP * 8])
        if WIDE:
            weights, v = weights.to(tl.float32), v.to(tl.float32)
        total = tl.dot(weights, v, total, input_precision="ieee")
    down = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at = y + which.to(tl.int64) * count + down
    tl.store(at, total.to(y.dtype.element_ty), mask=(down < count) & (which < tokens))


_SCHEMA = "Tensor codes, Tensor books, Tensor scales, int[] plan"


def _triton_additive(x: Tensor, codes: Tensor, books: Tensor, scales: Tensor, plan: list[int]) -> Tensor:
    """Multiply x (tokens, in) to (tokens, out) in the type of x.

    codes   int32 (rows, words), packed
    books   fp16 (codebooks, 2**bits, 8)
    scales  fp16 (rows|1, groups|1)
    plan    rows, columns, columns of a group, bits
    """
    rows, columns, width, bits = plan
    constants = {
        "COLUMNS": columns,
        "BLOCKS": triton.cdiv(columns, 8),
        "WORDS": codes.shape[1],
        "BITS": bits,
        "BOOKS": books.shape[0],
        "PER_GROUP": width // 8,
        "SCALE": tuple(scales.shape),
    }
    gemv = Launch(additive_gemv, GEMV_ROWS, {"STEP": GEMV_BLOCKS}, 4)
    gemm = Launch(additive_gemm, GEMM_ROWS, {"STEP": GEMM_BLOCKS}, 4)
    return multiply(x, (codes, books, scales), rows, constants, gemv, gemm)


additive = Operator("triton_additive", _SCHEMA, _triton_additive, lambda x, *rest: rest[-1][0], device=None)
