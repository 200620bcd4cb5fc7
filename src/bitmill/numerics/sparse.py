"""Few entries of a matrix, row by row: choice, positions, and best values next to a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_BUDGET = 1 << 22  # numbers in one batch of small systems


def largest(score: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` entries of the largest score; of equal ones the first.

    Args:
        score: any shape.
        count: entries to choose.
    """
    chosen = torch.zeros_like(score, dtype=torch.bool)
    if count == 0:
        return chosen
    last = score.flatten().topk(count).values[-1]
    torch.gt(score, last, out=chosen)
    equal = (score == last).flatten().nonzero()[: count - int(chosen.sum()), 0]
    chosen.view(-1)[equal] = True
    return chosen


def index_type(columns: int) -> torch.dtype:
    """Return the type that stores a column number or count: 16 bits, unsigned, where these suffice."""
    return torch.int16 if columns <= 0xFFFF else torch.int32


def to_index(numbers: Tensor, columns: int) -> Tensor:
    """Convert numbers from 0 to `columns` to `index_type`.

    Args:
        numbers: integers of any shape.
        columns: of the matrix.
    """
    if index_type(columns) == torch.int32:
        return numbers.to(torch.int32)
    return torch.where(numbers > 0x7FFF, numbers - 0x10000, numbers).to(torch.int16)


def from_index(stored: Tensor) -> Tensor:
    """Invert `to_index`, int64."""
    return stored.to(torch.int64) & (0xFFFF if stored.dtype == torch.int16 else 0xFFFFFFFF)


def places(counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of every entry, int64.

    Args:
        counts: (rows,) entries of each row, as stored by `to_index`.
        columns: (entries,) column numbers, as stored by `to_index`.
    """
    counts = from_index(counts)
    rows = torch.repeat_interleave(
        torch.arange(len(counts), device=counts.device), counts, output_size=len(columns)
    )
    return rows, from_index(columns)


def best_values(error: Tensor, gram: Tensor, mask: Tensor, damp: float) -> Tensor:
    """Return values S at the masked entries that leave the least of tr((error - S) gram (error - S)^T).

    Every row is a small system of its own, J the masked columns of the row:

        s_J = (G_JJ + d I)^-1 ((error G)_J + d error_J)

    Args:
        error: (rows, columns), what a dense matrix leaves.
        gram: (columns, columns).
        mask: bool (rows, columns).
        damp: d as a share of the mean diagonal; it pulls towards error itself, the answer for independent inputs.

    Returns:
        The values in the order of the mask's rows.
    """
    ridge = max(damp * float(gram.diagonal().mean()), 1e-30)
    right_side = error @ gram + ridge * error
    counts = mask.sum(1)
    values = torch.zeros_like(error)
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[counts[order] > 0]
    while len(order):
        most = int(counts[order[0]])
        rows, order = order.split([step := min(len(order), max(1, _BUDGET // most**2)), len(order) - step])
        inside = torch.arange(most, device=error.device) < counts[rows, None]
        columns = mask[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        system = gram[columns[:, :, None], columns[:, None, :]].double()
        system.diagonal(dim1=1, dim2=2).add_(ridge)
        both = inside[:, :, None] & inside[:, None, :]
        system = torch.where(both, system, torch.eye(most, dtype=system.dtype, device=error.device))
        right = right_side[rows].gather(1, columns).double() * inside
        solved = torch.linalg.solve(system, right).to(error.dtype)
        values[rows[:, None], columns] = torch.where(inside, solved, values[rows[:, None], columns])
    return values[mask]
