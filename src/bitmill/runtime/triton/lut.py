"""lut_gemv and lut_gemm: y = x W^^T where every code is an entry of a small table, at 1 to 8 bits.

    W^[r, k] = scale[r, g] * powers[power[r, g]] * (table[code[r, k]] - zero[r, g])

They read codes in lanes (`lanes`), prepared once: in the packed layout groups begin anywhere in a word, so that
the word and the shift of a code are variables. In lanes they are constants of the compiled kernel, at most one
funnel shift and one mask at every width, and neighbouring threads read neighbouring words.

lut_gemv multiplies one token: one program sums a few rows in fp32 in one pass over their words, without atomic
additions, so that equal inputs give equal bits. lut_gemm multiplies more tokens: values are decoded in the type of
the inputs, multiplied by the matrix units and summed in fp32.

For uniform levels the codes are the only table, and lut_gemv reads none. Most codes need no shift either: the bits
of a code inside a word are a denormal float, which is exact; its product with an input scaled by a power of two is
a normal one.

With m_rk = |scale * power| * (max |table| + |zero|), and before y is rounded to the type of x,

    lut_gemv   |error of y_r| <= 2^-18 * sum_k |x_k| * m_rk
    lut_gemm   |error of y_r| <= (2^-24 * (columns + 64) + u) * sum_k |x_k| * m_rk, u 2^-8 for bf16 inputs, 2^-11
               for fp16 unless weights are too small for it, 0 for fp32

for up to 2^16 columns and inputs of lut_gemv below 2^47.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill.formats import Lookup
from bitmill.runtime.ops import Operator
from bitmill.runtime.triton.lanes import lanes_per_group, stride_of
from bitmill.runtime.triton.launch import Launch, multiply
from bitmill.runtime.triton.tiles import of_group, places, words_of

GEMV_ROWS = 8
GEMM_ROWS, GEMM_LANES = 32, 32


@triton.jit
def _factors(
    scales, zeros, ids, powers, rows, groups, inside, count,
    SCALE: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, ID_BITS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Return scale, zero and the first entry of the table of every lane: fp32, fp32, int64."""
    scale = of_group(scales, rows, groups, inside, count, SCALE).to(tl.float32)
    zero = of_group(zeros, rows, groups, inside, count, ZERO).to(tl.float32)
    table = inside.to(tl.int32) * 0
    if ids is not None:
        table += of_group(ids, rows, groups, inside, count, TABLE).to(tl.int32)
        if powers is not None:
            scale *= tl.load(powers + (table >> ID_BITS), mask=inside, other=0)
            table &= (1 << ID_BITS) - 1
    else:  # a table for every group, row or matrix
        if TABLE[0] > 1:
            table += rows * TABLE[1]
        if TABLE[1] > 1:
            table += groups
        table = tl.where(inside, table, 0)
    return scale, zero, table.to(tl.int64) << BITS


# One lane a thread. A thread would load several elements of aligned tensors but one of others, and the threads
# would have to exchange elements for every code.
@triton.jit(do_not_specialize_on_alignment=["x", "codes", "scales", "zeros", "ids"])
def lut_gemv(
    x, y, codes, tables, scales, zeros, ids, powers, count,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    PER_GROUP: tl.constexpr, STRIDE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    TABLE: tl.constexpr, ID_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute y (count,) = W^ x for one token.

    Args (the others are tensors of `LutWeights`):
        x: (columns,).
        y: (count,), the result.
        count: Rows of the matrix.
        SCALE, ZERO, TABLE: Shapes of scales, zeros, and of tables or ids.
        ROWS: Rows of a program.
        BLOCK: Lanes processed at a time.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, LANES, BLOCK):
        lanes = (start + tl.arange(0, BLOCK))[None, :]
        inside = (rows < count) & (lanes < LANES)
        words = words_of(codes, rows, lanes, inside, BITS, LANES)
        groups, offset = places(lanes, PER_GROUP, STRIDE)
        scale, zero, table = _factors(
            scales, zeros, ids, powers, rows, groups, inside, count, SCALE, ZERO, TABLE, ID_BITS, BITS
        )
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        ones = tl.zeros([1, BLOCK], tl.float32)
        for i in tl.static_range(32):
            column = groups * WIDTH + offset + i * STRIDE
            real = (lanes < LANES) & (offset + i * STRIDE < WIDTH) & (column < COLUMNS)
            v = tl.load(x + column, mask=real, other=0).to(tl.float32)
            ones += v
            code = words[i * BITS // 32]
            if tables is None:
                # the bits of a code alone are the float code * 2**(position - 149), if they are in its mantissa;
                # the input is scaled by 2**-position, once for all rows
                if i * BITS % 32 + BITS <= 23:
                    level = code & (((1 << BITS) - 1) << i * BITS % 32)
                    v *= 2.0 ** (80 - i * BITS % 32)
                elif i * BITS % 32 + BITS <= 32:
                    level = (code >> 9) & (((1 << BITS) - 1) << (i * BITS % 32 - 9))
                    v *= 2.0 ** (80 - i * BITS % 32 + 9)
                else:
                    level = (code >> i * BITS % 32) | (words[i * BITS // 32 + 1] << (32 - i * BITS % 32))
                    level = level & ((1 << BITS) - 1)
                    v *= 2.0**80
                sums = tl.fma(level.to(tl.float32, bitcast=True), v, sums)
            else:
                code = code >> (i * BITS % 32)
                if i * BITS % 32 + BITS > 32:
                    code |= words[i * BITS // 32 + 1] << (32 - i * BITS % 32)
                at = tables + table + (code & ((1 << BITS) - 1)).to(tl.int64)
                sums = tl.fma(tl.load(at).to(tl.float32), v, sums)
        if tables is None:
            sums *= 2.0**69
        total += scale * (sums - zero * ones)
    tl.store(y + rows, tl.sum(total, 1)[:, None].to(y.dtype.element_ty), mask=rows < count)


@triton.jit
def lut_gemm(
    x, y, codes, tables, scales, zeros, ids, powers, count, tokens,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    PER_GROUP: tl.constexpr, STRIDE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    TABLE: tl.constexpr, ID_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute y (tokens, count) = x W^^T.

    Args (the others as in lut_gemv):
        tokens: Tokens of x.
        TOKENS: Tokens of a program.
        WIDE: Multiply in fp32, which Triton's interpreter needs for bf16.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    which = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, LANES, BLOCK):
        lanes = (start + tl.arange(0, BLOCK))[None, :]
        inside = (rows < count) & (lanes < LANES)
        words = words_of(codes, rows, lanes, inside, BITS, LANES)
        groups, _ = places(lanes, PER_GROUP, STRIDE)
        scale, zero, table = _factors(
            scales, zeros, ids, powers, rows, groups, inside, count, SCALE, ZERO, TABLE, ID_BITS, BITS
        )
        bias = -scale * zero
        down = (start + tl.arange(0, BLOCK))[:, None]  # these lanes, for the inputs
        down_groups, down_offset = places(down, PER_GROUP, STRIDE)
        for i in tl.static_range(32):
            column = down_groups * WIDTH + down_offset + i * STRIDE
            real = (down < LANES) & (down_offset + i * STRIDE < WIDTH) & (column < COLUMNS)
            v = tl.load(x + which.to(tl.int64) * COLUMNS + column, mask=real & (which < tokens), other=0)
            code = words[i * BITS // 32] >> (i * BITS % 32)
            if i * BITS % 32 + BITS > 32:
                code |= words[i * BITS // 32 + 1] << (32 - i * BITS % 32)
            code = code & ((1 << BITS) - 1)
            if tables is None:
                level = code.to(tl.float32)
            else:
                level = tl.load(tables + table + code.to(tl.int64)).to(tl.float32)
            weight = tl.fma(level, scale, bias).to(v.dtype)
            if WIDE:
                weight, v = weight.to(tl.float32), v.to(tl.float32)
            total = tl.dot(weight, v, total, input_precision="ieee")
    at = y + which.to(tl.int64) * count + rows
    tl.store(at, total.to(y.dtype.element_ty), mask=(rows < count) & (which < tokens))


def gemv_launch(kernel: Any, lanes: int) -> Launch:
    """Return the launch of a gemv kernel: one lane a thread, some rows a program.

    Args:
        kernel: lut_gemv or binary_gemv.
        lanes: Lanes of a row.
    """
    block = max(32, min(128, triton.next_power_of_2(lanes)))
    return Launch(kernel, GEMV_ROWS, {"BLOCK": block}, block // 32)


def gemm_launch(kernel: Any) -> Launch:
    """Return the launch of a gemm kernel."""
    return Launch(kernel, GEMM_ROWS, {"BLOCK": GEMM_LANES}, 4)


def lane_constants(columns: int, width: int, codes: Tensor) -> dict[str, int]:
    """Return the compile-time arguments that describe codes in lanes.

    Args:
        columns: Columns of the matrix.
        width: Columns of a group.
        codes: (rows, bits, lanes).
    """
    return {
        "COLUMNS": columns,
        "WIDTH": width,
        "BITS": codes.shape[1],
        "LANES": codes.shape[2],
        "PER_GROUP": lanes_per_group(width),
        "STRIDE": stride_of(width),
    }


@dataclass(frozen=True)
class LutWeights:
    """A matrix as the kernels read it. Sizes of 1 are broadcast.

    Attributes:
        shape: (rows, columns).
        width: Columns of a group.
        codes: int32 (rows, bits, lanes).
        tables: fp16 or fp32 (rows|1, groups|1, 2**bits), with ids (n, 1, 2**bits); None for levels 0, 1, 2, ...
        scales: fp16 or fp32 (rows|1, groups|1).
        zeros: uint8, fp16 or fp32 (rows|1, groups|1).
        ids: uint8 or int32 (rows|1, groups|1): table + (power << id_bits).
        powers: fp32, the factors of scales.
        id_bits: Bits of a table's number in `ids`.
    """

    shape: tuple[int, int]
    width: int
    codes: Tensor
    tables: Tensor | None
    scales: Tensor
    zeros: Tensor
    ids: Tensor | None = None
    powers: Tensor | None = None
    id_bits: int = 0

    def parts(self) -> list[Tensor | None]:
        """Return the tensors in the order of the operator's arguments."""
        return [self.codes, self.tables, self.scales, self.zeros, self.ids, self.powers]

    def plan(self) -> list[int]:
        """Return the integers of the operator: rows, columns, width, id_bits."""
        return [*self.shape, self.width, self.id_bits]


def prepare(lookup: Lookup, codes: Tensor, shape: tuple[int, int], width: int) -> LutWeights:
    """Build the tensors that the kernels read.

    Args:
        lookup: Tables, scales and zeros of the format.
        codes: int32 (rows, bits, lanes), from `lanes.to_lanes`.
        shape: (rows, columns).
        width: Columns of a group.
    """
    scale, zero, tables = lookup.scale, lookup.zero, lookup.tables
    ids, power, powers, id_bits = lookup.table, lookup.power, lookup.powers, 0
    placed = tables[:, None]
    if tables.shape[0] == 1:
        ids = None
    elif ids is not None and power is None and _counts(ids):  # a table for each: no ids needed
        placed, ids = tables.view(*ids.shape, -1), None
    if power is not None and powers is not None:
        id_bits = (tables.shape[0] - 1).bit_length()
        ids = power << id_bits if ids is None else ids + (power << id_bits)
    if ids is not None:
        ids = ids.to(torch.uint8 if int(ids.max()) < 256 else torch.int32)
    step = _step(tables)
    if step is not None:
        scale, zero = scale * step, (zero - tables[0, 0]) / step
    return LutWeights(
        shape,
        width,
        codes,
        None if step is not None else _smallest(placed) if placed.shape[1] > 1 else placed.contiguous(),
        _smallest(scale),
        _smallest(zero, torch.uint8),
        None if ids is None else ids.contiguous(),
        None if power is None or powers is None else powers.to(torch.float32).contiguous(),
        id_bits,
    )


def _counts(ids: Tensor) -> bool:
    return torch.equal(ids.flatten(), torch.arange(ids.numel(), device=ids.device))


def _step(tables: Tensor) -> float | None:
    """Return the step of a single table with even steps of a power of two (division is exact), or None."""
    if tables.shape[0] > 1 or tables.shape[1] < 2:
        return None
    step = float(tables[0, 1] - tables[0, 0])
    even = tables[0, 0] + step * torch.arange(tables.shape[1], device=tables.device)
    return step if step > 0 and math.frexp(step)[0] == 0.5 and torch.equal(tables[0], even) else None


def _smallest(values: Tensor, *types: torch.dtype) -> Tensor:
    """Return values in the first of `types` and fp16 that holds them exactly, or unchanged."""
    for dtype in (*types, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype).contiguous()
    return values.contiguous()


_SCHEMA = "Tensor codes, Tensor? tables, Tensor scales, Tensor zeros, Tensor? ids, Tensor? powers, int[] plan"


def _triton_lut(
    x: Tensor,
    codes: Tensor,
    tables: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    ids: Tensor | None,
    powers: Tensor | None,
    plan: list[int],
) -> Tensor:
    """Multiply x (tokens, in) to (tokens, out) in the type of x; see `LutWeights.parts` and `LutWeights.plan`."""
    rows, columns, width, id_bits = plan
    lanes = codes.shape[2]
    table = (1, 1) if tables is None else tuple(tables.shape[:2])
    constants = {
        **lane_constants(columns, width, codes),
        "SCALE": tuple(scales.shape),
        "ZERO": tuple(zeros.shape),
        "TABLE": table if ids is None else tuple(ids.shape),
        "ID_BITS": id_bits,
    }
    arguments = (codes, tables, scales, zeros, ids, powers)
    return multiply(x, arguments, rows, constants, gemv_launch(lut_gemv, lanes), gemm_launch(lut_gemm))


lut = Operator("triton_lut", _SCHEMA, _triton_lut, lambda x, *rest: rest[-1][0], device=None)
