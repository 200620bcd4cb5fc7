"""Scaled: a fixed table times one factor a group, W^ = factor * table[code].

Floating-point elements and quantile tables differ in the table and in how the factor is stored, and share
everything else: one search over factors, one least-squares refit, one rounding on the table itself.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.base import Params, Rounder
from bitmill.formats.fitting import as_stored, least_error, positive, weighted_error
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat
from bitmill.numerics.table import Table


@dataclass(frozen=True)
class Scaled(ScalarFormat):
    """Base of the formats with one table for all groups."""

    shares: ClassVar[tuple[float, ...]] = ()  # multiples of the starting factor that the search tries
    signed: ClassVar[bool] = False  # the factor may be negative, which turns a table that is not symmetric around

    @abstractmethod
    def table(self, device: torch.device) -> Table:
        """Return the table at factor 1, of 2**bits values."""

    @abstractmethod
    def factor(self, params: Params) -> Tensor:
        """Return the factor of the table, positive unless `signed`, never 0, (rows|1, groups|1)."""

    @abstractmethod
    def start(self, x: Tensor) -> Params:
        """Return the published closed-form parameters of x (rows, groups, width)."""

    @abstractmethod
    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Return the parts of `params` that change when every group gets a new factor.

        Args:
            factor: (rows, groups); the nearest storable factor is taken, and never 0.
            params: the present parameters.
        """

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Return the published start, or the factor of least weighted error among `shares` of it."""
        start = self.start(x)
        return self._search(x, importance, start) if search else start

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Search the factor of one group (rows, 1, width); parts that groups share stay."""
        return self._search(x, importance, {**params, **self.start_group(x, params)})

    def start_group(self, x: Tensor, params: Params) -> Params:
        """Return the parts of `params` that belong to the groups, as `start` would choose them.

        Args:
            x: (rows, groups, width).
            params: the parts that groups share.
        """
        return self.start(x)  # all of them, where nothing is shared

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the factor at fixed codes by weighted least squares, kept only where it lowers the error.

        The error is a parabola in the factor, so the storable factor nearest to its minimum is the best one.
        """
        steps = self._table(x.device).lookup(codes)
        power = (steps.square() * importance).sum(-1)
        best = (steps * x * importance).sum(-1) / power.clamp(min=1e-30)
        fresh = self.with_factor(best if self.signed else best.clamp(min=0), params)
        error = weighted_error(x, self.decode(codes, {**params, **fresh}), importance)
        better = ((best > 0) | self.signed) & (error < weighted_error(x, self.decode(codes, params), importance))
        return {**params, **{name: torch.where(better, v, params[name]) for name, v in fresh.items()}}

    def _search(self, x: Tensor, importance: Tensor, start: Params) -> Params:
        factor = self.factor(start)
        trials = (self.with_factor(factor * share, start) for share in self.shares)
        return least_error(self._snap, x, importance, start, trials)

    # -- the table ----------------------------------------------------------------------------------------

    def levels(self, params: Params) -> Tensor:
        """Return factor * table."""
        factor = self.factor(params)
        return factor[..., None] * self._table(factor.device).values

    def lookup(self, params: Params) -> Lookup:
        """Return one table."""
        factor = self.factor(params)
        return Lookup(self._table(factor.device).values[None], factor, torch.zeros_like(factor))

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Divide by the factor and round to the one table; equal to the search in each group's own table.

        Returns:
            uint8 (rows, groups, width).
        """
        return self._table(x.device).codes(x / self.factor(params)[..., None])

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return factor * place, where x is no more than half a gap beyond the outermost levels."""
        factor = self.factor(params)[..., None]
        place = x.detach() / factor.detach()
        low, high = self._table(x.device).rounded_range
        return torch.where((place >= low) & (place <= high), place * factor, x)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return factor * table[code].

        Returns:
            fp32 (rows, groups, width).
        """
        return self._table(codes.device).lookup(codes).mul_(self.factor(params)[..., None])

    def rounder(self, params: Params) -> Rounder:
        """Return a function that divides one column by the factor and rounds it to the table."""
        factor = self.factor(params)[:, 0]
        table = self._table(factor.device)

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = table.codes(w / factor)
            return codes, table.lookup(codes).mul_(factor)

        return column

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        factor = self.factor(params)[..., None]
        return self._table(x.device).rounded(x / factor).mul_(factor)

    def _table(self, device: torch.device) -> Table:
        return _table(self, device)


@dataclass(frozen=True)
class FloatScaled(Scaled):
    """Base of the tables with one fp16 scale a group; fits start with the largest number at the largest value."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """Largest value of the table."""

    def factor(self, params: Params) -> Tensor:
        """Return the scale."""
        return params["scale"]

    def start(self, x: Tensor) -> Params:
        """Map the largest magnitude to the largest value."""
        return self.with_factor(x.abs().amax(-1) / self.largest, {})

    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Store the scale in fp16.

        Returns:
            "scale" (rows, groups), positive.
        """
        return {"scale": positive(as_stored(factor))}

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the fp16 scale."""
        return (Part("scale", self.grid(shape)),)


@cache
def _table(format: Scaled, device: torch.device) -> Table:
    return format.table(device)
