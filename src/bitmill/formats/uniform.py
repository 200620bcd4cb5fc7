"""Uniform: evenly spaced levels, W^ = scale * (code - zero).

    code   unsigned, `bits` bits, in [0, 2**bits)
    scale  fp16, one a group; fp32 with scale_type="float32", which imported codes may need
    zero   unsigned, `bits` bits, one a group; absent when symmetric, where it is 2**(bits-1); fp16 with
           zero="float"

The range always includes 0, and an integer zero stores 0 exactly; a fractional one can lower the error of
the weights, and often costs more perplexity than that gains. Bits a weight: bits + (16 + bits)/group_size,
bits + 16/group_size when symmetric, bits + 32/group_size with a float zero.

Source: Jacob et al. 2018 (arXiv 1712.05877), section 2.1; the shrinking search of GPTQ's code
(IST-DASLab/gptq, quant.py), here weighted by importance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params, Rounder
from bitmill.formats.fitting import as_stored, least_error, positive, refit_scale, weighted_error
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import SCALE_TYPES, Part, ScaleType
from bitmill.formats.scalar import RangeFormat
from bitmill.numerics.straight_through import BEYOND

# Shares of the full range that the search tries, widest first.
_SHRINK = torch.linspace(1.0, 0.35, 27, device="cpu").tolist()
_STATIC_SHARES = tuple(0.8**k for k in range(20))  # inputs have longer tails than weights


@FORMATS.register("uniform")
@dataclass(frozen=True)
class Uniform(RangeFormat):
    """Evenly spaced levels: `bits` 1 to 8, one scale (and zero) per tensor, row or group.

    Symmetric codes have one more negative level than positive ones; with 1 bit they hold no positive number.
    """

    symmetric: bool = False
    zero: Literal["integer", "float"] = "integer"
    scale_type: ScaleType = "float16"

    left_out: ClassVar[dict[str, Any]] = {"scale_type": "float16"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric and self.zero == "float":
            raise RecipeError("symmetric fixes the zero, which cannot be a float then; set symmetric=false.")

    def static_candidates(self, x: Tensor) -> Params:
        """Return the parameters of shares of the range, of both ends unless symmetric."""
        shares = torch.tensor(_STATIC_SHARES, device=x.device)
        low, high = x.amin().clamp(max=0) * shares, x.amax().clamp(min=0) * shares
        if self.symmetric:
            return self.from_range(low[:, None], high[:, None])
        pairs = torch.cartesian_prod(low, high)
        return self.from_range(pairs[:, :1], pairs[:, 1:])

    def static_neighbours(self, params: Params, step: float) -> Params:
        """Return the parameters with other scales."""
        factors = 1 + step * torch.linspace(-1, 1, 8, device=params["scale"].device)[:, None]
        scales = positive(as_stored(params["scale"] * factors))
        return {name: scales if name == "scale" else v.expand_as(scales) for name, v in params.items()}

    @property
    def arithmetic(self) -> Literal["integer"] | None:
        """Integers, unless the zero is a float."""
        return "integer" if self.zero == "integer" else None

    @property
    def can_shift(self) -> bool:
        """True with a float zero: all levels of a group can move together."""
        return self.zero == "float"

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Fit the range from minimum to maximum, or the shrunken range of least weighted squared error.

        Returns:
            "scale" (rows, groups) and, unless symmetric, "zero" (rows, groups).
        """
        low = x.amin(-1).clamp(max=0)
        high = x.amax(-1).clamp(min=0)
        start = self.from_range(low, high)
        if not search:
            return start
        trials = (self.from_range(low * share, high * share) for share in _SHRINK[1:])
        return least_error(self._snap, x, importance, start, trials)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the scale (and a float zero) at fixed codes by weighted least squares, kept where that helps."""
        if self.zero == "float":
            return self._refit_line(x, codes, importance, params)
        return refit_scale(self, x, codes, importance, params)

    def _refit_line(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Fit the line through (code, x): its slope is the scale, its root the zero."""
        weight = (importance / importance.sum(-1, keepdim=True).clamp(min=1e-30)).expand(x.shape)
        steps = codes.to(x.dtype)
        middle, height = (steps * weight).sum(-1), (x * weight).sum(-1)
        spread = ((steps - middle[..., None]).square() * weight).sum(-1)
        slope = ((steps - middle[..., None]) * x * weight).sum(-1) / spread.clamp(min=1e-30)
        scale = torch.where(as_stored(slope) > 0, as_stored(slope), params["scale"])
        trial = {"scale": scale, "zero": as_stored(middle - height / scale)}
        old = weighted_error(x, self.decode(codes, params), importance)
        better = weighted_error(x, self.decode(codes, trial), importance) < old
        return {name: torch.where(better, value, params[name]) for name, value in trial.items()}

    def shift(self, params: Params, by: Tensor) -> Params:
        """Move the levels up by `by`: the zero moves down by `by / scale`."""
        return {**params, "zero": as_stored(params["zero"] - by / params["scale"])}

    def levels(self, params: Params) -> Tensor:
        """Return scale * (0..2**bits-1 - zero)."""
        codes = torch.arange(1 << self.bits, device=params["scale"].device, dtype=torch.float32)
        return params["scale"][..., None] * (codes - self._zero(params)[..., None])

    def lookup(self, params: Params) -> Lookup:
        """Return one table, of the codes themselves."""
        codes = torch.arange(1 << self.bits, device=params["scale"].device, dtype=torch.float32)
        return Lookup(codes[None], params["scale"], self._zero(params))

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Round and clamp; equal to the table search and much faster at 8 bits.

        Returns:
            uint8 (rows, groups, width).
        """
        return self._round(x, params["scale"][..., None], self._zero(params)[..., None]).to(torch.uint8)

    @property
    def learned_integers(self) -> frozenset[str]:
        """The integer zero."""
        return frozenset({"zero"} if self.zero == "integer" and not self.symmetric else ())

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return scale * (place - zero), where x is no more than half a step beyond the outermost levels."""
        scale, zero = params["scale"][..., None], self._zero(params)[..., None]
        place = (x.detach() / scale.detach()).add_(zero.detach())
        rounded = (place >= -BEYOND) & (place <= (1 << self.bits) - 1 + BEYOND)
        return torch.where(rounded, place.sub(zero) * scale, x)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return scale * (code - zero).

        Returns:
            fp32 (rows, groups, width).
        """
        return torch.sub(codes, self._zero(params)[..., None]).mul_(params["scale"][..., None])

    def rounder(self, params: Params) -> Rounder:
        """Return a function that rounds and clamps one column."""
        scale, zero = params["scale"][:, 0], self._zero(params)[:, 0]

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = self._round(w, scale, zero)
            return codes.to(torch.uint8), codes.sub_(zero).mul_(scale)

        return column

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the scale; the zero in `bits` bits or fp16, unless symmetric."""
        grid = self.grid(shape)
        scale = Part("scale", grid, stored_as=SCALE_TYPES[self.scale_type])
        if self.symmetric:
            return (scale,)
        return scale, Part("zero", grid, None if self.zero == "float" else self.bits)

    def _round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.zero == "float":
            return (x / scale).add_(zero).round_().clamp_(0, (1 << self.bits) - 1)
        return (x / scale).round_().add_(zero).clamp_(0, (1 << self.bits) - 1)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        scale, zero = params["scale"][..., None], self._zero(params)[..., None]
        return self._round(x, scale, zero).sub_(zero).mul_(scale)

    def _zero(self, params: Params) -> Tensor:
        if self.symmetric:
            return torch.full_like(params["scale"], 1 << (self.bits - 1))
        return params["zero"]

    def from_range(self, low: Tensor, high: Tensor) -> Params:
        """Return scale (never 0) and zero that cover a range.

        Args:
            low, high: (rows, groups) each, low <= 0 <= high.
        """
        top = (1 << self.bits) - 1
        if self.symmetric:
            high = torch.maximum(high, -low)
            return {"scale": positive(as_stored(2 * high / top))}
        scale = positive(as_stored((high - low) / top))
        if self.zero == "float":
            return {"scale": scale, "zero": as_stored(-low / scale)}
        return {"scale": scale, "zero": torch.clamp(torch.round(-low / scale), 0, top)}
