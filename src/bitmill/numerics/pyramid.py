"""Integer points on a pyramid: y with sum |y_i| = pulses, as directions of a vector, and their numbering.

Pyramid vector quantization (Fischer 1986) stores the direction of x as such a y, without any codebook: the
N(d, k) points in d dimensions with k pulses are numbered from 0 to N - 1. The numbering here halves the
vector: a point of 2h coordinates with k pulses, j of them in the first half, has

    number = sum_{i<j} N(h, i) N(h, k-i)  +  number of the first half * N(h, k-j)  +  number of the second

down to single coordinates, where 0 pulses have the number 0, and +k and -k have 0 and 1. Every step is made
for a whole batch at once, and numbers below 2**64 fit the 64 bits of an integer read as unsigned. The
numbering is part of the storage format: it may never change.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from bitmill.numerics.packing import as_bytes

_SIGN = -(1 << 63)
_MOVES = 2  # beyond these, one vector in a hundred still improves


@cache
def count(dimension: int, pulses: int) -> int:
    """Return N(d, k), the number of integer vectors of a dimension with L1 norm `pulses`.

    Args:
        dimension: d.
        pulses: k.
    """
    if pulses == 0 or dimension == 0:
        return int(pulses == 0)
    shorter = count(dimension - 1, pulses)
    return shorter + count(dimension, pulses - 1) + count(dimension - 1, pulses - 1)


def most_pulses(dimension: int, bits: int) -> int:
    """Return the largest k with N(dimension, k) <= 2**bits.

    Args:
        dimension: coordinates of a vector.
        bits: of its number.
    """
    pulses = 0
    while count(dimension, pulses + 1) <= 1 << bits:
        pulses += 1
    return pulses


def project(x: Tensor, pulses: int) -> Tensor:
    """Project vectors to points of the pyramid with nearly the largest cosine.

    |x| is scaled to the L1 norm and rounded down; each pulse still missing is added where the cosine gains most.
    Then single pulses move: for t = |y|^2 / <|x|, y> a move that brings y closer to t |x| raises the cosine.
    A point of the pyramid is its own projection; a vector without direction (zero, or not finite) gets all pulses
    in its first coordinate. Every operation is one of IEEE 754 in a fixed order, as in csrc/vector/nearest-inl.h.

    Args:
        x: fp32 (n, d).
        pulses: the L1 norm.

    Returns:
        y int64 (n, d).
    """
    size = x.abs()
    total = halved_sum(size)
    usable = total.isfinite() & total.reciprocal().isfinite()
    first = torch.eye(1, x.shape[1], device=x.device)
    size = torch.where(usable, size, first) * (torch.where(usable, total, 1.0).reciprocal() * pulses)
    y = (size + 1e-4).floor_()  # a share that is whole but for rounding; the sum still cannot pass `pulses`
    cross, power = halved_sum(size * y), y.square().sum(1, keepdim=True)
    missing = pulses - y.sum(1, keepdim=True)
    for _ in range(int(missing.max()) if len(x) else 0):
        gain = (cross + size).square_().div_(power + 2 * y + 1)
        _move(y, size, cross, power, gain.argmax(1, keepdim=True), (missing > 0).to(x.dtype))
        missing -= 1
    for _ in range(_MOVES):
        short = size * (power / cross) - y
        most, place = short.max(1, keepdim=True)
        least, source = torch.where(y > 0, short, torch.inf).min(1, keepdim=True)
        better = (most - least > 1 + 1e-4).to(x.dtype)
        _move(y, size, cross, power, source, -better)
        _move(y, size, cross, power, place, better)
    return torch.where(x < 0, -y, y).to(torch.int64)


def halved_sum(x: Tensor) -> Tensor:
    """Return the sum of rows, half added to half until one number is left: in one order on every machine.

    Args:
        x: (n, d), d a power of two.

    Returns:
        (n, 1).
    """
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def _move(y: Tensor, size: Tensor, cross: Tensor, power: Tensor, place: Tensor, pulse: Tensor) -> None:
    """Add `pulse` (n, 1), of 1, 0 or -1, to y at `place` (n, 1), and update <size, y> and |y|^2."""
    cross += pulse * size.gather(1, place)
    power += pulse * (2 * y.gather(1, place) + pulse)
    y.scatter_add_(1, place, pulse)


def number(y: Tensor, pulses: int) -> Tensor:
    """Return the numbers of points.

    Args:
        y: int64 (n, d) of L1 norm `pulses`, d a power of two.
        pulses: the L1 norm.

    Returns:
        int64 (n,), to be interpreted as unsigned.
    """
    size = y.abs()
    index = ((y < 0) & (size > 0)).to(torch.int64)
    while size.shape[1] > 1:
        offsets, counts = _tables(y.shape[1] // size.shape[1], pulses, y.device)
        first, rest = size[:, ::2], size[:, 1::2]
        total = first + rest
        index = offsets[total, first] + index[:, ::2] * counts[rest] + index[:, 1::2]
        size = total
    return index[:, 0]


def point(numbers: Tensor, dimension: int, pulses: int) -> Tensor:
    """Invert `number`.

    Numbers of no point (N(dimension, pulses) and above) give some vector, not an error.

    Args:
        numbers: int64 (n,), interpreted as unsigned.
        dimension: a power of two.
        pulses: the L1 norm.

    Returns:
        int64 (n, dimension).
    """
    index = numbers[:, None]
    size = torch.full_like(index, pulses)
    while size.shape[1] < dimension:
        half = dimension // size.shape[1] // 2
        offsets, counts = _tables(half, pulses, index.device)
        first = _search(offsets, size, index)
        index = index - offsets[size, first]
        width = counts[size - first]
        left = index // width
        index = torch.stack([left, index - left * width], 2).flatten(1)
        size = torch.stack([first, size - first], 2).flatten(1)
    return torch.where(index == 1, -size, size)


def _search(offsets: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """Return the last entry j of offsets[row] that is not above the unsigned index, by bisection."""
    low = torch.zeros_like(row)
    step = 1 << max(0, int(offsets.shape[1] - 1).bit_length() - 1)
    while step:
        trial = low + step
        inside = trial <= row
        trial = torch.where(inside, trial, low)
        low = torch.where((offsets[row, trial] ^ _SIGN) <= (index ^ _SIGN), trial, low)
        step //= 2
    return low


@lru_cache(maxsize=64)
def _tables(half: int, pulses: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return counts of points as signed integers.

    Returns:
        offsets (pulses + 1, pulses + 1), points of k pulses with fewer than j in the first half; and N(half, k).
    """
    offsets = torch.zeros(pulses + 1, pulses + 1, dtype=torch.int64)
    for k in range(pulses + 1):
        below = 0
        for j in range(k + 1):
            offsets[k, j] = _signed(below)
            below += count(half, j) * count(half, k - j)
    counts = torch.tensor([_signed(count(half, k)) for k in range(pulses + 1)])
    return offsets.to(device), counts.to(device)


def _signed(value: int) -> int:
    """Return the signed integer of equal 64 bits; values of points that do not exist wrap, and are not used."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def has_number_beyond(words: Tensor, points: int, bits: int, total: int) -> bool:
    """Return True if a stored number of 16 * bits bits is `total` or more.

    The highest byte of a number almost always decides, so that only every few hundredth is read whole.

    Args:
        words: int32 (rows, words), numbers and 4 more bits each, one after another.
        points: numbers of a row.
        bits: 1 to 4.
        total: numbers that there are.
    """
    stored, most = as_bytes(words), total - 1
    pair = 4 * bits + 1  # bytes of two numbers, the second of which starts within a byte
    last = most >> (16 * bits - 8)
    even = stored[:, 2 * bits - 1 :: pair][:, : (points + 1) // 2]
    low, high = stored[:, pair - 2 :: pair][:, : points // 2], stored[:, pair - 1 :: pair][:, : points // 2]
    for parity, top in enumerate((even, low >> 4 | high << 4)):
        if bool((top > last).any()):
            return True
        rows, pairs = (top == last).nonzero(as_tuple=True)
        if _any_above(stored, rows, pairs * pair + parity * 2 * bits, 4 * parity, 2 * bits, most):
            return True
    return False


def _any_above(stored: Tensor, rows: Tensor, first: Tensor, shift: int, size_bytes: int, most: int) -> bool:
    """Return True if one of the numbers that start `shift` bits after bytes `first` of rows is above `most`."""
    numbers = torch.zeros_like(first)
    for i in range(size_bytes):
        byte = stored[rows, first + i].long() >> shift
        if shift:
            byte |= stored[rows, first + i + 1].long() << (8 - shift) & 255
        numbers |= byte << 8 * i
    limit = most - (1 << 64) if most >> 63 else most  # as int64, interpreted as unsigned
    return bool(((numbers ^ _SIGN) > (limit ^ _SIGN)).any())
