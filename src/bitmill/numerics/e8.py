"""Sixteen-bit codes of eight numbers on the lattice E8, shifted by a quarter: 2 bits a number.

E8 + 1/4 is the union of D + 1/4 and D - 1/4, D the vectors of odd multiples of 1/2 whose sum is even. The
codebook keeps the vectors of D with one of 256 patterns of absolute values:

    all 227 of squared norm up to 10, which are the arrangements of seven multisets of 1/2, 3/2, 5/2
    29 of the 56 arrangements of five 3/2 and three 1/2, squared norm 12

    code = pattern | signs << 8 | shift << 15      bit i of signs negates coordinate i, i < 7; the parity of
                                                   the sum decides the eighth; shift 1 adds 1/4, 0 subtracts it

so that a table of 256 x 8 decodes 65536 points. The numbering of patterns is part of the storage format and never
changes.

Tseng et al. 2024, "QuIP#" (arXiv 2402.04396), section 4.2 (E8P). The paper fixes 227 patterns; the choice of those
of norm 12 that complete the byte, and the numbering, are this module's own.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

BLOCK = 8
POINTS = 1 << 16

# (how many 5/2, how many 3/2) of the seven multisets, and of the fill.
_KINDS = ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (0, 4), (1, 1))
_FILL = 29
_SLICE = 1 << 12  # vectors searched at a time, so that temporaries stay in the cache


@lru_cache(maxsize=8)
def patterns(device: torch.device | str = "cpu") -> Tensor:
    """Return the absolute values, (256, 8) fp32, by kind, each in lexicographic order of its large positions."""
    rows = [_pattern(large) for large in _arrangements()]
    return torch.tensor(rows, device=device)


@lru_cache(maxsize=8)
def points(device: torch.device | str = "cpu") -> Tensor:
    """Return the point of every code, (65536, 8) fp32."""
    code = torch.arange(POINTS, device=device)
    table = patterns(device)[code & 255]
    negative = (code[:, None] >> 8 >> torch.arange(BLOCK, device=device)) & 1
    negative[:, 7] = (negative[:, :7].sum(1) + table.sum(1).long()) & 1
    return table * (1 - 2 * negative) + ((code >> 15).float() - 0.5)[:, None] / 2


def nearest(x: Tensor) -> Tensor:
    """Return the codes int64 (n,) of the points closest to x (n, 8) fp32; exact up to ties."""
    return (
        torch.cat([_search(piece) for piece in x.split(_SLICE)]) if len(x) else x.new_zeros(0, dtype=torch.int64)
    )


def _search(x: Tensor) -> Tensor:
    """Search both shifts, each by its best pattern."""
    error, code = _of_shift(x, -0.25)
    other, shifted = _of_shift(x, 0.25)
    return torch.where(other < error, shifted | (1 << 15), code)


def _of_shift(x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Return (squared distance, code without its shift bit) of the vector of D closest to y = x - shift.

    With free signs a pattern p does best with the signs of y: |y - p|^2 = |y|^2 + |p|^2 - 2 |y|.p. Where that
    breaks the parity of the sum, one sign must flip, which costs 4 min |y_i| p_i. Of the arrangements of a
    multiset the best pairs large with large; it has a 1/2, so that the cheapest flip is at the smallest |y_i|.
    """
    y = x - shift
    size = y.abs()
    negative = y < 0
    odd = negative.sum(1) & 1
    large, order = size.sort(dim=1, descending=True, stable=True)
    # from here one vector is a column: every line is then a few long rows
    large = large.T.contiguous()
    runs = large.cumsum(0).mul_(2)
    kinds, fill = len(_KINDS), patterns(x.device)[-_FILL:]
    gain = x.new_empty(kinds + _FILL, len(x))
    for row, (fives, threes) in zip(gain, _KINDS):
        torch.sub(runs[7], 4 + 12 * fives + 4 * threes, out=row).div_(2)
        for top in filter(None, (fives + threes, fives)):
            row += runs[top - 1]
        row.addcmul_(large[7], odd ^ (threes & 1), value=-2)
    columns = size.T.contiguous()
    least = fill[:, :1] * columns[:1]
    for i in range(1, BLOCK):
        torch.minimum(least, fill[:, i : i + 1] * columns[i], out=least)
    # five 3/2 and three 1/2 have an odd sum, which an odd number of signs makes even
    torch.addmm(least.mul_(4 * (odd - 1)).sub_(12), fill, columns, alpha=2, out=gain[kinds:])

    best, choice = gain.max(0)
    five, large_ones, index = _tables(x.device)
    is_kind, kind = choice < kinds, choice.clamp(max=kinds - 1)
    places = torch.nn.functional.pad((1 << order).cumsum(1), (1, 0))  # bit sets of the 0, 1, 2, ... largest
    at_five, at_large = (places.gather(1, count[kind][:, None])[:, 0] for count in (five, large_ones))
    pattern = torch.where(is_kind, index[at_five, at_large], choice + (256 - _FILL - kinds))

    values = patterns(x.device)[pattern]
    broken = (odd + values.sum(1).long()) & 1
    turn = (size * values).argmin(1, keepdim=True)
    negative ^= torch.zeros_like(negative).scatter_(1, turn, broken[:, None].bool())
    bits = (negative[:, :7].long() << torch.arange(8, 15, device=x.device)).sum(1)
    return y.square().sum(1) - best, pattern | bits


def _arrangements() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (positions of 5/2, positions of 3/2) of every pattern, in their order."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for fives, threes in _KINDS:
        for five in combinations(range(BLOCK), fives):
            rest = [i for i in range(BLOCK) if i not in five]
            found += [(five, three) for three in combinations(rest, threes)]
    last = list(combinations(range(BLOCK), 5))
    return found + [((), three) for three in [*last[::2], last[-1]]]


def _pattern(places: tuple[tuple[int, ...], tuple[int, ...]]) -> list[float]:
    return [2.5 if i in places[0] else 1.5 if i in places[1] else 0.5 for i in range(BLOCK)]


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the counts of 5/2 and of larger entries of each kind; and pattern numbers by position bit sets."""
    index = torch.zeros(256, 256, dtype=torch.int64)
    for number, (five, three) in enumerate(_arrangements()[: 256 - _FILL]):
        index[sum(1 << i for i in five), sum(1 << i for i in (*five, *three))] = number
    fives = torch.tensor([five for five, _ in _KINDS])
    return fives.to(device), torch.tensor([a + b for a, b in _KINDS]).to(device), index.to(device)
