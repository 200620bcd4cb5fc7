"""Binary codings on an integer grid, ranked by usefulness.

A coding of m bits on an n-bit grid is a base and m positive steps: its 2**m levels are the base plus the
subset sums of the steps, all integers in [-2**(n-1), 2**(n-1)). The uniform grid is the coding with steps
1, 2, 4, ... There are thousands of codings, but a few dozen suffice: `rank` orders them by how much each adds
to those before it on synthetic groups, so that any prefix of the list is a good dictionary and the meaning of an
index does not depend on any model's weights.

`python -m bitmill.numerics.codings` writes formats/data/codings.json. The file is part of the storage format
of `integer_coding`: entries may be appended, never changed.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

SHIPPED = ((4, 2), (4, 3), (5, 1), (5, 2), (5, 3), (5, 4), (6, 2))
KEEP = 64


def enumerate_codings(grid_bits: int, bits: int) -> Tensor:
    """Return all codings of `bits` bits on a grid of `grid_bits` bits.

    Returns:
        int64 (count, 1 + bits): base, then steps in descending order.
    """
    top = (1 << grid_bits) - 1
    low = -(1 << (grid_bits - 1))
    rows: list[tuple[int, ...]] = []
    for steps in itertools.combinations_with_replacement(range(top, 0, -1), bits):
        span = sum(steps)
        if span <= top:
            rows.extend((low + base, *steps) for base in range(top - span + 1))
    return torch.tensor(rows)


def levels_of(codings: Tensor) -> Tensor:
    """Return the levels of codings (count, 1 + bits), fp32 (count, 2**bits).

    Entry c is the base plus the steps of c's set bits.
    """
    bits = codings.shape[1] - 1
    chosen = (torch.arange(1 << bits)[:, None] >> torch.arange(bits)) & 1
    return (codings[:, :1] + codings[:, 1:] @ chosen.T).float()


def snap_table(levels: Tensor, grid_bits: int) -> Tensor:
    """Return the level nearest to each half-integer bin of the grid.

    Levels are integers, so the boundary between two of them is a multiple of 1/2: numbers in one bin
    [b/2, (b+1)/2) share their nearest level. The first and last bins reach to infinity.

    Args:
        levels: (count, 2**bits).
        grid_bits: bits of the grid.

    Returns:
        (count, 2**(grid_bits+1)).
    """
    bins = 1 << (grid_bits + 1)
    centres = (torch.arange(bins) - 0.5) / 2 - (1 << (grid_bits - 1))
    nearest = (centres[None, :, None] - levels[:, None, :]).abs().argmin(-1)
    return levels.gather(1, nearest)


def bin_moments(x: Tensor, weight: Tensor, grid_bits: int) -> tuple[Tensor, Tensor]:
    """Sum weight and weight*x per half-integer bin over the last axis.

    Args:
        x: (..., n), in units of the grid.
        weight: (..., n).
        grid_bits: bits of the grid.

    Returns:
        Two tensors (..., 2**(grid_bits+1)).
    """
    bins = 1 << (grid_bits + 1)
    index = ((x + (1 << (grid_bits - 1))) * 2).floor_().add_(1).clamp_(0, bins - 1).long()
    empty = x.new_zeros(*x.shape[:-1], bins)
    return empty.scatter_add(-1, index, weight), empty.scatter_add(-1, index, weight * x)


def rank(grid_bits: int, bits: int, keep: int = KEEP, groups: int = 1200, width: int = 32) -> Tensor:
    """Choose the most useful codings in greedy order on synthetic groups.

    Half the groups are Gaussian, half Student t with 5 degrees of freedom; importances are log-normal, as
    the diagonals of Gram matrices are. Every coding is tried at 33 scales.

    Args:
        grid_bits, bits: of the grid and of the codings.
        keep: codings to return.
        groups, width: number and width of the synthetic groups.

    Returns:
        int64 (keep, 1 + bits).
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(groups, width, generator=draw, dtype=torch.float64)
    half = groups // 2
    chi = torch.randn(groups - half, width, 5, generator=draw, dtype=torch.float64).square().sum(-1)
    x[half:] *= (5 / chi).sqrt()
    weight = (torch.randn(groups, width, generator=draw, dtype=torch.float64) * 0.7).exp()
    weight /= weight.sum(1, keepdim=True)
    power = (weight * x * x).sum(1, keepdim=True)

    codings = enumerate_codings(grid_bits, bits)
    snapped = snap_table(levels_of(codings), grid_bits).double()
    best = torch.full((groups, len(codings)), torch.inf, dtype=torch.float64)
    for octave in torch.linspace(-1.6, 1.6, 33).tolist():
        scale = power.sqrt() * 2.0 ** (octave - grid_bits + 2)
        mass, moment = bin_moments(x / scale, weight, grid_bits)
        cost = (mass @ snapped.square().T - 2 * moment @ snapped.T) * scale.square() + power
        best = torch.minimum(best, cost)
    best /= power
    order: list[int] = []
    reached = torch.full((groups,), torch.inf, dtype=torch.float64)
    for _ in range(min(keep, len(codings))):
        order.append(int(torch.minimum(best, reached[:, None]).sum(0).argmin()))
        reached = torch.minimum(reached, best[:, order[-1]])
    return codings[order]


def main() -> None:
    """Write the shipped lists."""
    lists = {f"{n},{m}": rank(n, m).tolist() for n, m in SHIPPED}
    path = Path(__file__).parents[1] / "formats" / "data" / "codings.json"
    rows = [f'"{key}": {json.dumps(value)}' for key, value in lists.items()]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
