"""Rounding columns in turn in compiled code, for formats whose codes are entries of small tables.

Rows are independent, so that any number of threads and every instruction set give equal bytes. The steps in torch
(`feedback`, `descent`) sum in other orders: nearly all codes are equal, and errors differ by rounding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill import native
from bitmill.formats import GroupFormat, Params
from bitmill.formats.scalar import ScalarFormat

_MOST_BITS = 5  # each value is compared with all levels; beyond, a binary search is faster


class SortedLevels:
    """The levels of all rows and groups in ascending order, rows last.

    table, codes: (groups, levels, rows) fp32 and uint8.  middles: (groups, levels - 1, rows).
    """

    def __init__(self, format: ScalarFormat, params: Params, rows: int) -> None:
        table, order = format.levels(params).sort(dim=-1, stable=True)
        self.table, self.codes = (
            v.expand(rows, -1, -1).permute(1, 2, 0).contiguous() for v in (table, order.to(torch.uint8))
        )
        self.middles = (self.table[:, 1:] + self.table[:, :-1]) / 2

    def feedback(self, groups: Tensor, U: Tensor, W: Tensor, codes: Tensor, errors: Tensor) -> None:
        """Round columns in turn; later ones absorb the errors of those before them.

        Args:
            groups: int32 (columns,).
            U: upper triangular (columns, columns), see `feedback`.
            W: (columns, rows), replaced by the rounded values.
            codes: uint8 (columns, rows), overwritten.
            errors: (columns, rows), overwritten by errors over the diagonal of U.
        """
        native.native().round_with_feedback(
            self.table, self.middles, self.codes, groups, U.contiguous(), W, codes, errors, native.threads()
        )

    def descend(
        self, groups: Tensor, H: Tensor, place: Tensor, gradient: Tensor, Q: Tensor, codes: Tensor
    ) -> Tensor:
        """Move columns in turn to the level that is best with all others as they are.

        Args:
            groups: int32 (columns,).
            H: (columns, columns), symmetric.
            place: int64 (columns,), their places in Q and codes.
            gradient: (columns, rows), H times the error, overwritten.
            Q, codes: (all columns, rows), changed at `place`.

        Returns:
            The moves (columns, rows).
        """
        moved = torch.empty_like(gradient)
        native.native().round_by_descent(
            self.table, self.middles, self.codes, groups, H, place, gradient, Q, codes, moved, native.threads()
        )
        return moved


def sorted_levels(format: GroupFormat, params: Params, rows: int) -> SortedLevels | None:
    """Return the levels for the compiled steps, or None where the steps in torch must do.

    Args:
        format: of the codes.
        params: of all groups.
        rows: of the matrix.
    """
    if not isinstance(format, ScalarFormat) or format.code_bits > _MOST_BITS:
        return None
    on_cpu = all(value.device.type == "cpu" for value in params.values())
    if not on_cpu or native.unsupported_reason("round_with_feedback"):
        return None
    return SortedLevels(format, params, rows)
