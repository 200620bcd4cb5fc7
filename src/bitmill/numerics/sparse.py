"""Few entries of a matrix, row by row: which ones, where they are, and their best values beside a dense rest."""

from __future__ import annotations

import torch
from torch import Tensor

_BUDGET = 1 << 22  # numbers in one batch of small systems


def largest(score: Tensor, count: int) -> Tensor:
    """A mask of exactly `count` entries of the largest score; of equal ones those that come first."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    if count == 0:
        return chosen
    last = score.flatten().topk(count).values[-1]
    torch.gt(score, last, out=chosen)
    equal = (score == last).flatten().nonzero()[: count - int(chosen.sum()), 0]
    chosen.view(-1)[equal] = True
    return chosen


def index_type(columns: int) -> torch.dtype:
    """What stores a column number, or a count of columns: 16 bits, unsigned, where these suffice."""
    return torch.int16 if columns <= 0xFFFF else torch.int32


def to_index(numbers: Tensor, columns: int) -> Tensor:
    """Numbers from 0 to `columns` as `index_type` holds them."""
    if index_type(columns) == torch.int32:
        return numbers.to(torch.int32)
    return torch.where(numbers > 0x7FFF, numbers - 0x10000, numbers).to(torch.int16)


def from_index(stored: Tensor) -> Tensor:
    """Inverse of `to_index`, int64."""
    return stored.to(torch.int64) & (0xFFFF if stored.dtype == torch.int16 else 0xFFFFFFFF)


def places(counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every entry, int64, from stored counts of entries a row and stored column numbers."""
    counts = from_index(counts)
    rows = torch.repeat_interleave(
        torch.arange(len(counts), device=counts.device), counts, output_size=len(columns)
    )
    return rows, from_index(columns)


def best_values(error: Tensor, gram: Tensor, mask: Tensor, damp: float) -> Tensor:
    """Values at the masked entries that leave the least of tr((error - S) gram (error - S)^T).

    error: (rows, columns), what a dense matrix leaves.  gram: (columns, columns).  Returns the values in the
    order of the mask's rows. `damp`, a share of the mean diagonal, pulls towards error itself, the answer for
    independent inputs. Every row is a small system of its own:

        s_J = (G_JJ + d I)^-1 ((error G)_J + d error_J),    J the masked columns of the row
    """
    ridge = max(damp * float(gram.diagonal().mean()), 1e-30)
    wanted = error @ gram + ridge * error
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
        right = wanted[rows].gather(1, columns).double() * inside
        solved = torch.linalg.solve(system, right).to(error.dtype)
        values[rows[:, None], columns] = torch.where(inside, solved, values[rows[:, None], columns])
    return values[mask]
