"""Scalar formats: every code is an entry of a small table of its group."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.base import GroupFormat, Params, Rounder
from bitmill.formats.lookup import Lookup
from bitmill.numerics.straight_through import between_levels


class ScalarFormat(GroupFormat):
    """A format whose every code is an entry of a small table: `levels(params)[code]`.

    One lookup kernel therefore runs all of them, but for those of one sign.
    """

    one_sided: ClassVar[bool] = False  # levels crowd at one end: tables in bytes would add up the rounding there

    @abstractmethod
    def levels(self, params: Params) -> Tensor:
        """Return the table (rows|1, groups|1, 2**bits) fp32; entry c is the value of code c."""

    def lookup(self, params: Params) -> Lookup:
        """Return the levels as tables and factors; formats with fewer tables than groups override it."""
        levels = self.levels(params)
        which = torch.arange(levels.shape[0] * levels.shape[1], device=levels.device).view(levels.shape[:2])
        one = torch.ones(1, 1, device=levels.device)
        return Lookup(levels.flatten(0, 1), one, 0 * one, which)

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Count how many midpoints of the sorted table are below x, then translate rank to code.

        Returns:
            uint8 (rows, groups, width).
        """
        table, order = self.levels(params).sort(-1)
        middles = (table[..., 1:] + table[..., :-1]) / 2
        rank = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for k in range(middles.shape[-1]):
            rank += x > middles[..., k : k + 1]
        shape = (*x.shape[:-1], order.shape[-1])
        return order.expand(shape).gather(-1, rank).to(torch.uint8)

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return x at its place between two levels."""
        return between_levels(x, self.levels(params))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Look every code up in its group's table.

        Returns:
            fp32 (rows, groups, width).
        """
        table = self.levels(params)
        return table.expand(*codes.shape[:-1], table.shape[-1]).gather(-1, codes.long())

    def rounder(self, params: Params) -> Rounder:
        """Sort the table once; then a column costs one binary search and two lookups."""
        table, order = self.levels(params)[:, 0].sort(-1)
        middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            rank = torch.searchsorted(middles.expand(w.shape[0], -1).contiguous(), w[:, None].contiguous())
            rows = w.shape[0]
            codes = order.expand(rows, -1).gather(1, rank)[:, 0].to(torch.uint8)
            return codes, table.expand(rows, -1).gather(1, rank)[:, 0]

        return column


class RangeFormat(ScalarFormat):
    """A format of evenly spaced levels, scale * (code - zero), whose parameters follow from a range of numbers.

    With `symmetric` the zero is the middle code 2**(bits-1) and is not stored.
    """

    symmetric: bool

    def integers(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes around the middle one."""
        middle = 1 << (self.bits - 1)
        zero = params.get("zero")
        centred = (codes.to(torch.int16) - middle).to(torch.int8)
        return centred, params["scale"], None if zero is None else zero - middle

    @abstractmethod
    def from_range(self, low: Tensor, high: Tensor) -> Params:
        """Return the parameters that cover a range: "scale", never 0, and "zero" unless symmetric.

        Args:
            low, high: (rows, groups) each, low <= 0 <= high.
        """
