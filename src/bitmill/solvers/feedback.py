"""Error feedback: round columns, or blocks of columns, in turn, and let later columns absorb the error.

With G^-1 = U^T U and columns B rounded jointly from w_B to w^_B, the best move of the remaining columns R is

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
from bitmill.solvers.compiled import SortedLevels, sorted_levels

# Columns updated one by one before the rest of the matrix receives their sum in one product. Small enough
# that a chunk of a 3000-row matrix stays in the cache.
_CHUNK = 32


def zero_dead_inputs(W: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Set the weights of inputs that are always 0, which contribute nothing, to 0.

    On the diagonal they get the mean of the others, so that damping, a share of the mean, does not change.

    Args:
        W: (rows, columns).
        gram: (columns, columns).

    Returns:
        W, gram, and the mask of dead inputs (columns,).
    """
    dead = gram.diagonal() == 0
    if bool(dead.any()):
        gram, W, live = gram.clone(), W.clone(), ~dead
        gram.diagonal()[dead] = gram.diagonal()[live].mean() if bool(live.any()) else 1.0
        W[:, dead] = 0.0
    return W, gram, dead


def visiting_order(importance: Tensor, block: int, act_order: bool) -> Tensor:
    """Return the columns in the order in which they are rounded: blocks stay whole, a ragged one comes last.

    Args:
        importance: (columns,).
        block: columns coded jointly.
        act_order: order blocks by descending mean importance.
    """
    order = torch.arange(importance.shape[0], device=importance.device)
    if not act_order:
        return order
    whole = importance.shape[0] // block * block
    blocks = torch.argsort(importance[:whole].reshape(-1, block).mean(1), descending=True, stable=True)
    return torch.cat([order[:whole].reshape(-1, block)[blocks].flatten(), order[whole:]])


def run_error_feedback(Wt: Tensor, U: Tensor, grids: Grids, format: GroupFormat) -> Tensor:
    """Round all columns in turn.

    Columns are kept as contiguous rows, because each step reads some and updates those after them.

    Args:
        Wt: (columns, rows) in visiting order, overwritten by the stored numbers.
        U: upper triangular (columns, columns), see the module.
        grids: rounds the columns.
        format: of the codes.

    Returns:
        Codes (format.codes_in(columns), rows).
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
    levels, groups = grids.levels(start, stop, Wt)
    if levels is not None:
        levels.feedback(groups, U[start:stop, start:stop], Wt[start:stop], codes[start:stop], errors)
        return
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
        inside = (_whole(U[here, here], format.block),) if format.feeds_inside else ()
        codes[block_codes(format, here)], value = round_block(
            grids.rounder(j, Wt), Wt[here], format.block, *inside
        )
        error = torch.linalg.solve_triangular(U[here, here].T, Wt[here] - value, upper=False)
        errors[here.start - start : here.stop - start] = error
        Wt[here.stop : stop].addmm_(U[here, here.stop : stop].T, error, alpha=-1)
        Wt[here] = value


def _whole(U: Tensor, block: int) -> Tensor:
    """Return the factor of a block, with columns that do not exist added to a ragged one."""
    whole = torch.eye(block, dtype=U.dtype, device=U.device)
    whole[: len(U), : len(U)] = U
    return whole


def round_block(rounder: Rounder, wt: Tensor, block: int, *inside: Tensor) -> tuple[Tensor, Tensor]:
    """Round at most `block` columns jointly.

    Args:
        rounder: as of `GroupFormat.rounder`.
        wt: (columns, rows).
        block: columns of a whole block.
        inside: the factor U of the block, where the format feeds errors on inside it.

    Returns:
        Codes (codes_per_block, rows) and values (columns, rows).
    """
    columns = wt.shape[0]
    codes, values = rounder(torch.nn.functional.pad(wt.T, (0, block - columns)), *inside)
    return codes.T, values.T[:columns]


def block_codes(format: GroupFormat, columns: slice) -> slice:
    """Return the slice of the codes of some whole blocks of columns.

    Args:
        format: of the codes.
        columns: from the first of a block on.
    """
    return slice(columns.start // format.block * format.codes_per_block, format.codes_in(columns.stop))


def empty_codes(format: GroupFormat, columns: int, rows: int, device: torch.device) -> Tensor:
    """Return uninitialized codes of all columns.

    Returns:
        uint8, or int32 above 8 bits, (codes, rows).
    """
    dtype = torch.uint8 if format.code_bits <= 8 else torch.int32
    return torch.empty(format.codes_in(columns), rows, dtype=dtype, device=device)


class Grids(Protocol):
    """Rounders of the columns, or blocks of columns, in visiting order."""

    def stop(self, start: int, stop: int) -> int:
        """Return the end of a chunk of columns.

        Args:
            start: its first column.
            stop: the end that it may not exceed.
        """

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Return the rounder of a column, or of the block that starts there.

        Args:
            column: its position in visiting order.
            Wt: the present weights (columns, rows).
        """

    def levels(self, start: int, stop: int, Wt: Tensor) -> tuple[SortedLevels | None, Tensor]:
        """Return the levels of a chunk of columns, None where no compiled step reads them, and the groups (int32).

        Args:
            start, stop: the chunk, in visiting order.
            Wt: the present weights (columns, rows).
        """


class StaticGrids:
    """Grids fitted before the loop; columns may come in any order.

    groups: the group of each column, in visiting order.
    """

    def __init__(self, format: GroupFormat, params: Params, groups: Tensor) -> None:
        self.params = params
        count = max(value.shape[1] for value in params.values())
        self._format, self._count = format, count
        self._groups = groups.clamp(max=count - 1).to(torch.int32)
        self._group_of = self._groups.tolist()
        self._levels: SortedLevels | None = None
        self._rounders: list[Rounder] = []

    def stop(self, start: int, stop: int) -> int:
        """Return `stop`: a chunk may end anywhere."""
        return stop

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Return the rounder of the column's group."""
        if not self._rounders:
            self._rounders = [self._format.rounder(group_params(self.params, g)) for g in range(self._count)]
        return self._rounders[self._group_of[column]]

    def levels(self, start: int, stop: int, Wt: Tensor) -> tuple[SortedLevels | None, Tensor]:
        """Return the levels of all groups, and the groups of the columns."""
        if self._levels is None:
            self._levels = sorted_levels(self._format, self.params, Wt.shape[1])
        return self._levels, self._groups[start:stop]


class LocalGrids:
    """Grids fitted when the loop reaches each group, from weights that carry every correction so far."""

    def __init__(self, format: GroupFormat, importance: Tensor, search: bool, width: int) -> None:
        self._format, self._importance, self._search, self._width = format, importance, search, width
        self._fitted: list[Params] = []
        self._rounder: Rounder | None = None
        self._levels: SortedLevels | None = None

    def stop(self, start: int, stop: int) -> int:
        """Return the end of the group: inside a chunk, later columns still lack the chunk's updates."""
        return min(stop, (start // self._width + 1) * self._width)

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Return the rounder of the column's group, fitted at its first column."""
        self._fit(column, Wt)
        if self._rounder is None:
            self._rounder = self._format.rounder(self._fitted[-1])
        return self._rounder

    def levels(self, start: int, stop: int, Wt: Tensor) -> tuple[SortedLevels | None, Tensor]:
        """Return the levels of the group, fitted at its first column."""
        if self._fit(start, Wt):
            self._levels = sorted_levels(self._format, self._fitted[-1], Wt.shape[1])
        return self._levels, torch.zeros(stop - start, dtype=torch.int32)

    def _fit(self, column: int, Wt: Tensor) -> bool:
        """Fit the group that starts at a column; False for one inside, or one that is fitted."""
        if column // self._width < len(self._fitted):
            return False
        self._rounder = None
        cut = slice(column, column + self._width)
        self._fitted.append(fit_matrix(self._format, Wt[cut].T, self._importance[cut], self._search))
        return True

    @property
    def params(self) -> Params:
        """The parameters of all groups, once the loop is over."""
        return {name: torch.cat([p[name] for p in self._fitted], 1) for name in self._fitted[0]}
