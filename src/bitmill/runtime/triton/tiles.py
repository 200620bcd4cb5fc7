"""What the kernels share: how a program finds its words, its groups and its inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_of(codes, rows, lanes, inside, BITS: tl.constexpr, LANES: tl.constexpr):
    """The words of some rows' lanes: a tuple of `BITS` tiles."""
    at = codes + rows.to(tl.int64) * (BITS * LANES) + lanes
    words = ()
    for j in tl.static_range(BITS):
        words = words + (tl.load(at + j * LANES, mask=inside, other=0).to(tl.uint32, bitcast=True),)  # noqa: RUF005
    return words


@triton.jit
def of_group(values, rows, groups, inside, count, SHAPE: tl.constexpr, EACH: tl.constexpr = 1):
    """values (rows|1, groups|1) of `SHAPE`, `EACH` numbers apart, at some rows and the groups of some lanes.

    Sizes of 1 stay 1: what is read a row at a time would otherwise be spread over threads by rows.
    """
    if SHAPE[1] > 1:
        at = values + rows * 0 + groups * EACH
        if SHAPE[0] > 1:
            at += rows.to(tl.int64) * (SHAPE[1] * EACH)
        found = tl.load(at, mask=inside, other=0)
    elif SHAPE[0] > 1:
        found = tl.load(values + rows.to(tl.int64) * EACH, mask=rows < count, other=0)
    else:
        found = tl.load(values)
    return found


@triton.jit
def places(lanes, PER_GROUP: tl.constexpr, STRIDE: tl.constexpr):
    """Group of every lane, and the offset in it of code 0; code i is i * STRIDE further."""
    inner = lanes % PER_GROUP
    return lanes // PER_GROUP, inner // STRIDE * (STRIDE * 32) + inner % STRIDE
