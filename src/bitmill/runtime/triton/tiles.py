"""Functions that the Triton kernels share: addresses of words and of groups' parameters."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_of(codes, rows, lanes, inside, BITS: tl.constexpr, LANES: tl.constexpr):
    """Load the words of lanes.

    Args:
        codes: (rows, BITS, LANES) words.
        rows: Rows (R, 1).
        lanes: Lanes (1, L).
        inside: Mask (R, L).

    Returns:
        A tuple of BITS tiles (R, L), uint32.
    """
    at = codes + rows.to(tl.int64) * (BITS * LANES) + lanes
    words = ()
    for j in tl.static_range(BITS):
        words = words + (tl.load(at + j * LANES, mask=inside, other=0).to(tl.uint32, bitcast=True),)  # noqa: RUF005
    return words


@triton.jit
def of_group(values, rows, groups, inside, count, SHAPE: tl.constexpr, EACH: tl.constexpr = 1):
    """Load values (rows|1, groups|1) of `SHAPE`, at a stride of `EACH`, for some rows and the groups of some
    lanes.

    Sizes of 1 stay 1: otherwise values of rows would be distributed over threads by rows.
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
    """Return the group of every lane, and the offset of its code 0 in the group; code i is i * STRIDE further."""
    inner = lanes % PER_GROUP
    return lanes // PER_GROUP, inner // STRIDE * (STRIDE * 32) + inner % STRIDE
