"""Error feedback: round columns, or blocks of columns, in turn, and let those to come absorb the error.

With G^-1 = U^T U and columns B rounded jointly from w_B to w^_B, the others do best to move by

    w_R -= (w_B - w^_B) U_BB^-1 U_BR

For single columns this is GPTQ (arXiv 2210.17323, section 3) and LDLQ (arXiv 2307.13304); for blocks it is the
block LDLQ of QuIP# (arXiv 2402.04396, section 4.1). A block is rounded to the nearest code in the plain metric.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bitmill.formats import GroupFormat, Params
from bitmill.formats.base import Rounder
from bitmill.formats.fitting import group_params
from bitmill.formats.quantized import fit_matrix

# Columns updated one by one before the rest of the matrix receives their sum in one product. Small enough
# that a chunk of a 3000-row matrix stays in the cache.
_CHUNK = 32


def zero_dead_inputs(W: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, gram and the mask of inputs that are always 0, which contribute nothing whatever their weight: it is 0.

    On the diagonal they get the mean of the others, so that damping, a share of the mean, is not moved.
    """
    dead = gram.diagonal() == 0
    if bool(dead.any()):
        gram, W, live = gram.clone(), W.clone(), ~dead
        gram.diagonal()[dead] = gram.diagonal()[live].mean() if bool(live.any()) else 1.0
        W[:, dead] = 0.0
    return W, gram, dead


def visiting_order(loudness: Tensor, block: int, act_order: bool) -> Tensor:
    """Columns in the order in which they are rounded: blocks stay whole, a ragged one comes last.

    loudness (columns,): with `act_order`, blocks come by falling mean of it.
    """
    order = torch.arange(loudness.shape[0], device=loudness.device)
    if not act_order:
        return order
    whole = loudness.shape[0] // block * block
    blocks = torch.argsort(loudness[:whole].reshape(-1, block).mean(1), descending=True, stable=True)
    return torch.cat([order[:whole].reshape(-1, block)[blocks].flatten(), order[whole:]])


def run_error_feedback(Wt: Tensor, U: Tensor, grids: Grids, format: GroupFormat) -> Tensor:
    """The loop. Wt (columns, rows) in visiting order, overwritten by the stored numbers; returns their codes.

    codes: (format.codes_in(columns), rows). Columns are kept as contiguous rows, because each step reads some
    and updates those after them.
    """
    columns, rows = Wt.shape
    codes = empty_codes(format, columns, rows, Wt.device)
    step = _column if format.block == 1 else _block
    chunk = max(1, _CHUNK // format.block) * format.block
    start = 0
    while start < columns:
        stop = grids.stop(start, min(start + chunk, columns))
        errors = torch.empty(stop - start, rows, device=Wt.device)
        step(Wt, U, grids, format, codes, errors, start)
        Wt[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return codes


def _column(
    Wt: Tensor, U: Tensor, grids: Grids, format: GroupFormat, codes: Tensor, errors: Tensor, start: int
) -> None:
    """Round the columns of a chunk one by one."""
    stop = start + errors.shape[0]
    diagonal = U.diagonal()[start:stop].tolist()
    for j in range(start, stop):
        codes[j], value = grids.rounder(j, Wt)(Wt[j])
        error = torch.sub(Wt[j], value, out=errors[j - start]).div_(diagonal[j - start])
        Wt[j + 1 : stop].addr_(U[j, j + 1 : stop], error, alpha=-1)
        Wt[j] = value


def _block(
    Wt: Tensor, U: Tensor, grids: Grids, format: GroupFormat, codes: Tensor, errors: Tensor, start: int
) -> None:
    """Round the columns of a chunk block by block."""
    stop = start + errors.shape[0]
    for j in range(start, stop, format.block):
        here = slice(j, min(j + format.block, stop))
        codes[block_codes(format, here)], value = round_block(grids.rounder(j, Wt), Wt[here], format.block)
        error = torch.linalg.solve_triangular(U[here, here].T, Wt[here] - value, upper=False)
        errors[here.start - start : here.stop - start] = error
        Wt[here.stop : stop].addmm_(U[here, here.stop : stop].T, error, alpha=-1)
        Wt[here] = value


def round_block(rounder: Rounder, wt: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes (codes_per_block, rows) and values (columns, rows) of wt (columns, rows), at most `block` columns."""
    columns = wt.shape[0]
    codes, values = rounder(torch.nn.functional.pad(wt.T, (0, block - columns)))
    return codes.T, values.T[:columns]


def block_codes(format: GroupFormat, columns: slice) -> slice:
    """Where the codes of some whole blocks of columns are."""
    return slice(columns.start // format.block * format.codes_per_block, format.codes_in(columns.stop))


def empty_codes(format: GroupFormat, columns: int, rows: int, device: torch.device) -> Tensor:
    """Room for the codes of all columns, (codes, rows)."""
    dtype = torch.uint8 if format.code_bits <= 8 else torch.int32
    return torch.empty(format.codes_in(columns), rows, dtype=dtype, device=device)


class Grids(Protocol):
    """What rounds the columns, or blocks of columns, in the order in which they are visited."""

    def stop(self, start: int, stop: int) -> int:
        """Where a chunk from `start` that may reach to `stop` ends."""

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Of the column, or block that starts there, visited at this turn; Wt as it is then."""


class StaticGrids:
    """Grids fitted beforehand; columns may come in any order.

    groups: the group of each column, in visiting order.
    """

    def __init__(self, format: GroupFormat, params: Params, groups: Tensor) -> None:
        self.params = params
        count = max(value.shape[1] for value in params.values())
        self._rounders = [format.rounder(group_params(params, g)) for g in range(count)]
        self._groups = groups.clamp(max=count - 1).tolist()

    def stop(self, start: int, stop: int) -> int:
        """A chunk may end anywhere."""
        return stop

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Of the group of the column (or block that starts there) visited at this turn."""
        return self._rounders[self._groups[column]]


class LocalGrids:
    """Grids fitted as the loop reaches each group, from weights that carry every correction so far."""

    def __init__(self, format: GroupFormat, importance: Tensor, search: bool, width: int) -> None:
        self._format, self._importance, self._search, self._width = format, importance, search, width
        self._fitted: list[Params] = []

    def stop(self, start: int, stop: int) -> int:
        """Chunks end where groups end: inside a chunk, later columns still lack the chunk's updates."""
        return min(stop, (start // self._width + 1) * self._width)

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Of the group of `column`, fitted at its first column."""
        if column % self._width == 0:
            cut = slice(column, column + self._width)
            self._fitted.append(fit_matrix(self._format, Wt[cut].T, self._importance[cut], self._search))
            self._current = self._format.rounder(self._fitted[-1])
        return self._current

    @property
    def params(self) -> Params:
        """Of all groups, once the loop is over."""
        return {name: torch.cat([p[name] for p in self._fitted], 1) for name in self._fitted[0]}
