"""The interface of scalar formats to lookup kernels: small tables, and their scale factors.

    levels[r, g, c] = scale[r, g] * powers[power[r, g]] * (tables[table[r, g], c] - zero[r, g])

Every scalar format has this form (law: `Lookup.levels` equals `ScalarFormat.levels`); formats that need only few
tables of round numbers are looked up exactly in one byte an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Lookup:
    """Tables and factors of a matrix; sizes of 1 are shared along that axis."""

    tables: Tensor  # (n, 2**bits) fp32
    scale: Tensor  # (rows|1, groups|1) fp32
    zero: Tensor  # (rows|1, groups|1) fp32, in units of the table
    table: Tensor | None = None  # (rows|1, groups|1) int64, which table; None where there is one
    powers: Tensor | None = None  # (m,) fp32, further factors
    power: Tensor | None = None  # (rows|1, groups|1) int64, which of them
    offset: Tensor | None = None  # (rows|1, groups|1) fp32, added in place of -scale * zero, which is rounded then

    def factor(self) -> Tensor:
        """Return scale and power together, (rows|1, groups|1)."""
        if self.powers is None or self.power is None:
            return self.scale
        return self.scale * self.powers[self.power]

    def largest(self) -> Tensor:
        """Return a bound of the levels' magnitudes, (rows|1, groups|1): that of the table and the zero."""
        largest = self.tables.abs().amax(-1)
        tables = largest.view(1, -1) if self.table is None else largest[self.table]
        return self.factor().abs() * (tables + self.zero.abs())

    def levels(self) -> Tensor:
        """Return the levels, (rows|1, groups|1, 2**bits) fp32."""
        tables = self.tables[None] if self.table is None else self.tables[self.table]
        if self.offset is not None:
            return self.factor()[..., None] * tables + self.offset[..., None]
        return self.factor()[..., None] * (tables - self.zero[..., None])
