"""Half integers: evenly spaced levels around 0 and without it, W^ = scale * (code - (2**bits - 1) / 2).

    code   unsigned, `bits` bits
    scale  fp16, one a tensor by default

A 2-bit code means -3/2, -1/2, 1/2 or 3/2. As many levels are above 0 as below, and no zero is stored, which
suits numbers that are symmetric around 0, such as weights in a rotated basis. Levels reach 2.4 times the RMS,
or as far as the least error requires (`search`). Bits a weight: bits.

Source: QuIP (arXiv 2307.13304), section 4.2: one grid a matrix, its range a multiple of the RMS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params, Rounder
from bitmill.formats.fitting import as_stored, divide_or_zero, least_error, refit_scale, weighted_rms
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat
from bitmill.numerics.grouping import GroupSize

_REACH = 2.4  # of the outermost levels, in RMS
_SHARES = torch.linspace(1.8, 0.3, 31, device="cpu").tolist()  # of the reach, that the search tries


@FORMATS.register("half_integer")
@dataclass(frozen=True)
class HalfInteger(ScalarFormat):
    """Scaled half integers, symmetric around 0; `bits` 1 to 8."""

    group_size: GroupSize = "tensor"

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Put the outermost levels at 2.4 times the (weighted) RMS, or where the weighted error is least.

        Returns:
            "scale" (rows, groups).
        """
        start = _REACH * weighted_rms(x, importance) / self._centre
        params = {"scale": as_stored(start)}
        if not search:
            return params
        return least_error(self._snap, x, importance, params, ({"scale": as_stored(start * s)} for s in _SHARES))

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the scale at fixed codes by weighted least squares, kept only where it lowers the error."""
        return refit_scale(self, x, codes, importance, params)

    def levels(self, params: Params) -> Tensor:
        """Return scale * (-centre ... centre)."""
        codes = torch.arange(1 << self.bits, device=params["scale"].device)
        return params["scale"][..., None] * (codes - self._centre)

    def lookup(self, params: Params) -> Lookup:
        """Return one table, of the codes themselves."""
        codes = torch.arange(1 << self.bits, device=params["scale"].device, dtype=torch.float32)
        return Lookup(codes[None], params["scale"], torch.full_like(params["scale"], self._centre))

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Round and clamp.

        Returns:
            uint8 (rows, groups, width).
        """
        return self._round(x, params["scale"][..., None]).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return scale * (code - centre).

        Returns:
            fp32 (rows, groups, width).
        """
        return torch.sub(codes, self._centre).mul_(params["scale"][..., None])

    def rounder(self, params: Params) -> Rounder:
        """Return a function that rounds and clamps one column."""
        scale = params["scale"][:, 0]

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = self._round(w, scale)
            return codes.to(torch.uint8), codes.sub_(self._centre).mul_(scale)

        return column

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the fp16 scale."""
        return (Part("scale", self.grid(shape)),)

    @property
    def _centre(self) -> float:
        return ((1 << self.bits) - 1) / 2

    def _round(self, x: Tensor, scale: Tensor) -> Tensor:
        return divide_or_zero(x, scale).add_(self._centre).round_().clamp_(0, 2 * self._centre)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        scale = params["scale"][..., None]
        return self._round(x, scale).sub_(self._centre).mul_(scale)
