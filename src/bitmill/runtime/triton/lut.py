"""lut_gemv and lut_gemm: y = x W^^T where every code is an entry of a small table, at 1 to 8 bits.

    W^[r, k] = scale[r, g] * powers[power[r, g]] * (table[code[r, k]] - zero[r, g])

They read codes in lanes (`lanes`), prepared once at load: in the packed layout groups begin anywhere in a word,
so that the word and the shift of a code are variables. In lanes they are constants of the compiled kernel, at most
one funnel shift and one mask at every width, and neighbouring threads read neighbouring words.

lut_gemv serves one token: a program sums a few rows in fp32 in one pass over their words, and nobody adds to them
after it, so that equal inputs give equal bits. lut_gemm serves more: values are decoded in the type of the inputs
and multiplied by the matrix units, summed in fp32.

Where the only table is the codes themselves (uniform levels) lut_gemv reads none, and most codes it need not even
shift: the bits of a code inside of a word are a denormal float, and exact; multiplied with an input that is larger
by a power of two they are a normal one.

With m_rk = |scale * power| * (max |table| + |zero|), and before y is rounded to the type of x,

    lut_gemv   |error of y_r| <= 2^-18 * sum_k |x_k| * m_rk
    lut_gemm   |error of y_r| <= (2^-24 * (columns + 64) + u) * sum_k |x_k| * m_rk, u 2^-8 for bf16 inputs, 2^-11
               for fp16 unless weights are too small for it, 0 for fp32

for up to 2^16 columns and inputs of lut_gemv below 2^47.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill.formats import Lookup
from bitmill.runtime.ops import Operator
from bitmill.runtime.triton.available import MAX_TOKENS, widens
from bitmill.runtime.triton.lanes import lanes_per_group, stride_of
from bitmill.runtime.triton.tiles import of_group, places, words_of

GEMV_ROWS = 8
GEMM_ROWS, GEMM_LANES = 32, 32


@triton.jit
def _factors(
    scales, zeros, ids, powers, rows, groups, inside, count,
    SCALE: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, ID_BITS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Scale, zero and the first entry of the table of every lane: fp32, fp32, int64."""
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


# One lane a thread: of tensors known to be aligned a thread would load several, of others not, and what it holds
# of the ones would have to be exchanged for what it holds of the others, for every code.
@triton.jit(do_not_specialize_on_alignment=["x", "codes", "scales", "zeros", "ids"])
def lut_gemv(
    x, y, codes, tables, scales, zeros, ids, powers, count,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    PER_GROUP: tl.constexpr, STRIDE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    TABLE: tl.constexpr, ID_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (count,) = W^ x; `ROWS` rows a program, `BLOCK` lanes at a time. tables is None where codes are levels."""
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
                # the bits of a code alone are the float code * 2**(place - 149), if they lie in its mantissa;
                # place is undone on the side of the input, once for all rows
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
    """y (tokens, count) = x W^^T; `ROWS` rows and `TOKENS` tokens a program, `BLOCK` lanes at a time.

    WIDE: multiply in fp32, for the sake of Triton's interpreter.
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
        down = (start + tl.arange(0, BLOCK))[:, None]  # the same lanes, for the inputs
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


def gemv_block(lanes: int) -> tuple[int, int]:
    """(lanes at a time, warps): a lane a thread."""
    block = max(32, min(128, triton.next_power_of_2(lanes)))
    return block, block // 32


@dataclass(frozen=True)
class LutWeights:
    """A matrix as the kernels read it. Sizes of 1 are shared along that axis."""

    shape: tuple[int, int]
    width: int  # columns of a group
    codes: Tensor  # int32 (rows, bits, lanes)
    tables: Tensor | None  # fp16 or fp32 (rows|1, groups|1, 2**bits), with ids (n, 1, 2**bits); None: 0, 1, 2, ...
    scales: Tensor  # fp16 or fp32 (rows|1, groups|1)
    zeros: Tensor  # uint8, fp16 or fp32 (rows|1, groups|1)
    ids: Tensor | None = None  # uint8 or int32 (rows|1, groups|1): table + (power << id_bits)
    powers: Tensor | None = None  # fp32
    id_bits: int = 0

    def parts(self) -> list[Tensor | None]:
        """The tensors, in the order of the operator's arguments."""
        return [self.codes, self.tables, self.scales, self.zeros, self.ids, self.powers]

    def plan(self) -> list[int]:
        """The rest: rows, columns, width, id_bits."""
        return [*self.shape, self.width, self.id_bits]


def prepare(lookup: Lookup, codes: Tensor, shape: tuple[int, int], width: int) -> LutWeights:
    """Tables and factors of a matrix in groups of `width` columns, and its codes (rows, bits, lanes)."""
    scale, zero, tables = lookup.scale, lookup.zero, lookup.tables
    ids, power, powers, id_bits = lookup.table, lookup.power, lookup.powers, 0
    placed = tables[:, None]
    if tables.shape[0] == 1:
        ids = None
    elif ids is not None and power is None and _counts(ids):  # a table for each: no need to say which
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
    """The step of one table of even steps that are a power of two, so that dividing by it is exact."""
    if tables.shape[0] > 1 or tables.shape[1] < 2:
        return None
    step = float(tables[0, 1] - tables[0, 0])
    even = tables[0, 0] + step * torch.arange(tables.shape[1], device=tables.device)
    return step if step > 0 and math.frexp(step)[0] == 0.5 and torch.equal(tables[0], even) else None


def _smallest(values: Tensor, *types: torch.dtype) -> Tensor:
    """In the first of `types`, fp16 that holds the values exactly, or as they are."""
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
    """x (tokens, in) to (tokens, out) in the type of x: `LutWeights.parts` and `.plan`."""
    rows, columns, width, id_bits = plan
    tokens, lanes = x.shape[0], codes.shape[2]
    y = x.new_empty(tokens, rows)
    table = (1, 1) if tables is None else tuple(tables.shape[:2])
    constants = {
        "COLUMNS": columns,
        "WIDTH": width,
        "BITS": codes.shape[1],
        "LANES": lanes,
        "PER_GROUP": lanes_per_group(width),
        "STRIDE": stride_of(width),
        "SCALE": tuple(scales.shape),
        "ZERO": tuple(zeros.shape),
        "TABLE": table if ids is None else tuple(ids.shape),
        "ID_BITS": id_bits,
    }
    x, parts = x.contiguous(), (codes, tables, scales, zeros, ids, powers)
    with torch.cuda.device_of(x):
        if tokens == 1:
            block, warps = gemv_block(lanes)
            grid = (triton.cdiv(rows, GEMV_ROWS), 1)
            blocks = {"ROWS": GEMV_ROWS, "BLOCK": block}
            lut_gemv[grid](x, y, *parts, rows, **constants, **blocks, num_warps=warps)
        else:
            size = max(16, min(MAX_TOKENS, triton.next_power_of_2(tokens)))
            grid = (triton.cdiv(rows, GEMM_ROWS), triton.cdiv(tokens, size))
            blocks = {"ROWS": GEMM_ROWS, "BLOCK": GEMM_LANES, "TOKENS": size, "WIDE": widens(x)}
            lut_gemm[grid](x, y, *parts, rows, tokens, **constants, **blocks, num_warps=4)
    return y


lut = Operator(_SCHEMA, _triton_lut, lambda x, *rest: rest[-1][0], device=None)
