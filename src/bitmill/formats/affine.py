"""Affine: evenly spaced levels from an offset, W^ = scale * code + offset.

    code    unsigned, `bits` bits
    scale   one a group, of `scale_type`
    offset  one a group, of `scale_type`: the number of code 0

The levels are those of `uniform` with a fractional zero; here the offset is stored, as other programs do (MLX;
Q4_1, Q5_1, Q2_K, Q4_K and Q5_K of GGUF), whose numbers it holds to the bit: the product with the scale is rounded
to fp32, then the sum. Bits a weight: bits + 32/group_size, bits + 64/group_size with scale_type="float32".

Source: ggml/src/ggml-quants.c of llama.cpp; mlx.core.quantize.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params, Rounder
from bitmill.formats.fitting import as_stored, divide_or_zero, least_error, weighted_error
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import SCALE_TYPES, Part, ScaleType
from bitmill.formats.scalar import ScalarFormat
from bitmill.numerics.straight_through import BEYOND

_SHARES = torch.linspace(0.975, 0.5, 20, device="cpu").tolist()  # of the range, that the search tries


@FORMATS.register("affine")
@dataclass(frozen=True)
class Affine(ScalarFormat):
    """Evenly spaced levels between two numbers of each tensor, row or group; `bits` 1 to 8."""

    scale_type: ScaleType = "float16"

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Fit the range from minimum to maximum, or the one around its middle of least weighted squared error.

        Returns:
            "scale" and "offset" (rows, groups).
        """
        low, high = x.amin(-1), x.amax(-1)
        start = self._from_range(low, high)
        if not search:
            return start
        middle, half = (low + high) / 2, (high - low) / 2
        trials = (self._from_range(middle - half * share, middle + half * share) for share in _SHARES)
        return least_error(self._snap, x, importance, start, trials)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Fit the line through (code, x) by weighted least squares, kept only where it lowers the error."""
        weight = (importance / importance.sum(-1, keepdim=True).clamp(min=1e-30)).expand(x.shape)
        steps = codes.to(x.dtype)
        middle, height = (steps * weight).sum(-1), (x * weight).sum(-1)
        spread = ((steps - middle[..., None]).square() * weight).sum(-1)
        slope = as_stored(((steps - middle[..., None]) * x * weight).sum(-1) / spread.clamp(min=1e-30))
        scale = torch.where(slope > 0, slope, params["scale"])
        trial = {"scale": scale, "offset": as_stored(height - scale * middle)}
        old = weighted_error(x, self.decode(codes, params), importance)
        better = weighted_error(x, self.decode(codes, trial), importance) < old
        return {name: torch.where(better, value, params[name]) for name, value in trial.items()}

    @property
    def can_shift(self) -> bool:
        """True: all levels of a group can move together."""
        return True

    def shift(self, params: Params, by: Tensor) -> Params:
        """Add `by` to the offset."""
        return {**params, "offset": as_stored(params["offset"] + by)}

    def levels(self, params: Params) -> Tensor:
        """Return scale * (0..2**bits-1) + offset."""
        codes = torch.arange(1 << self.bits, device=params["scale"].device, dtype=torch.float32)
        return codes * params["scale"][..., None] + params["offset"][..., None]

    def lookup(self, params: Params) -> Lookup:
        """Return one table, of the codes themselves; of groups of one number, whose scale is 0, their own."""
        scale, offset = params["scale"], params["offset"]
        if bool((scale == 0).any()):
            return super().lookup(params)
        codes = torch.arange(1 << self.bits, device=scale.device, dtype=torch.float32)
        return Lookup(codes[None], scale, -offset / scale, offset=offset)

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Round and clamp.

        Returns:
            uint8 (rows, groups, width).
        """
        return self._round(x, params["scale"][..., None], params["offset"][..., None]).to(torch.uint8)

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return scale * place + offset, where x is no more than half a step beyond the outermost levels."""
        scale, offset = params["scale"][..., None], params["offset"][..., None]
        place = divide_or_zero(x.detach() - offset.detach(), scale.detach())
        rounded = (place >= -BEYOND) & (place <= (1 << self.bits) - 1 + BEYOND)
        return torch.where(rounded, place * scale + offset, x)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return scale * code + offset.

        Returns:
            fp32 (rows, groups, width).
        """
        return (codes * params["scale"][..., None]).add_(params["offset"][..., None])

    def rounder(self, params: Params) -> Rounder:
        """Return a function that rounds and clamps one column."""
        scale, offset = params["scale"][:, 0], params["offset"][:, 0]

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = self._round(w, scale, offset)
            return codes.to(torch.uint8), codes.mul_(scale).add_(offset)

        return column

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return scale and offset."""
        grid, stored_as = self.grid(shape), SCALE_TYPES[self.scale_type]
        return Part("scale", grid, stored_as=stored_as), Part("offset", grid, stored_as=stored_as)

    def _from_range(self, low: Tensor, high: Tensor) -> Params:
        """Return the parameters of levels between two numbers, (rows, groups) each."""
        return {"scale": as_stored((high - low) / ((1 << self.bits) - 1)), "offset": as_stored(low)}

    def _round(self, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return divide_or_zero(x - offset, scale).round_().clamp_(0, (1 << self.bits) - 1)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        return self.decode(self.nearest(x, params), params)
