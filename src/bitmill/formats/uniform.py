"""Uniform: evenly spaced levels, W^ = scale * (code - zero).

    code   unsigned, `bits` bits, in [0, 2**bits)
    scale  fp16, one a group
    zero   unsigned, `bits` bits, one a group; absent when symmetric, where it is 2**(bits-1)

The range always includes 0 and `zero` is an integer, so that 0 is stored exactly: a fractional zero costs
more perplexity than its lower weight error gains. Bits a weight: bits + (16 + bits)/group_size, or
bits + 16/group_size when symmetric.

Source: Jacob et al. 2018 (arXiv 1712.05877), section 2.1; the shrinking search of GPTQ's code
(IST-DASLab/gptq, quant.py), here weighted by importance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params, Part
from bitmill.formats.grouped import SLICE, Rounder, ScalarFormat, as_stored, weighted_error

# Shares of the full range that the search tries, widest first.
_SHRINK = torch.linspace(1.0, 0.35, 27).tolist()


@FORMATS.register("uniform")
@dataclass(frozen=True)
class Uniform(ScalarFormat):
    """Evenly spaced levels: `bits` 1 to 8, one scale (and zero) per tensor, row or group.

    Symmetric codes have one more negative level than positive ones; with 1 bit they hold no positive number.
    """

    symmetric: bool = False

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Min-max range, or the shrunken range of least weighted squared error."""
        low = x.amin(-1).clamp(max=0)
        high = x.amax(-1).clamp(min=0)
        best = self._from_range(low, high)
        if not search:
            return best
        rows = max(1, SLICE // max(1, x[0].numel()))
        for start in range(0, x.shape[0], rows):
            cut = slice(start, start + rows)
            piece, weight = x[cut], importance if importance.shape[0] == 1 else importance[cut]
            chosen = {name: value[cut] for name, value in best.items()}
            error = weighted_error(piece, self._snap(piece, chosen), weight)
            for share in _SHRINK[1:]:
                trial = self._from_range(low[cut] * share, high[cut] * share)
                trial_error = weighted_error(piece, self._snap(piece, trial), weight)
                better = trial_error < error
                error = torch.where(better, trial_error, error)
                for name in chosen:
                    chosen[name] = torch.where(better, trial[name], chosen[name])
            for name, value in chosen.items():
                best[name][cut] = value
        return best

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Weighted least squares for the scale at fixed codes and zero, kept only where it helps."""
        steps = codes.to(x.dtype) - self._zero(params)[..., None]
        power = (steps.square() * importance).sum(-1)
        scale = as_stored((steps * x * importance).sum(-1) / power.clamp(min=1e-30))
        old = weighted_error(x, self.decode(codes, params), importance)
        trial = {**params, "scale": scale}
        better = (scale > 0) & (weighted_error(x, self.decode(codes, trial), importance) < old)
        return {**params, "scale": torch.where(better, scale, params["scale"])}

    def levels(self, params: Params) -> Tensor:
        """scale * (0..2**bits-1 - zero)."""
        codes = torch.arange(1 << self.bits, device=params["scale"].device, dtype=torch.float32)
        return params["scale"][..., None] * (codes - self._zero(params)[..., None])

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Round and clamp; equal to the table search and much faster at 8 bits."""
        return self._round(x, params["scale"][..., None], self._zero(params)[..., None]).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """scale * (code - zero)."""
        return torch.sub(codes, self._zero(params)[..., None]).mul_(params["scale"][..., None])

    def rounder(self, params: Params) -> Rounder:
        """Round and clamp one column."""
        scale, zero = params["scale"][:, 0], self._zero(params)[:, 0]

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = self._round(w, scale, zero)
            return codes.to(torch.uint8), codes.sub_(zero).mul_(scale)

        return column

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """fp16 scale, and the zero in `bits` bits when asymmetric."""
        grid = self.grid(shape)
        scale = Part("scale", grid)
        return (scale,) if self.symmetric else (scale, Part("zero", grid, self.bits))

    def _round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (x / scale).round_().add_(zero).clamp_(0, (1 << self.bits) - 1)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        scale, zero = params["scale"][..., None], self._zero(params)[..., None]
        return self._round(x, scale, zero).sub_(zero).mul_(scale)

    def _zero(self, params: Params) -> Tensor:
        if self.symmetric:
            return torch.full_like(params["scale"], 1 << (self.bits - 1))
        return params["zero"]

    def _from_range(self, low: Tensor, high: Tensor) -> Params:
        """Scale (never 0) and zero that cover [low, high]."""
        top = (1 << self.bits) - 1
        if self.symmetric:
            high = torch.maximum(high, -low)
            return {"scale": _positive(as_stored(2 * high / top))}
        scale = _positive(as_stored((high - low) / top))
        return {"scale": scale, "zero": torch.clamp(torch.round(-low / scale), 0, top)}


def _positive(scale: Tensor) -> Tensor:
    """A group of zeros gets scale 1: any positive number stores it exactly. The smallest fp16 bounds the rest."""
    return torch.where(scale > 0, scale.clamp(min=2.0**-24), torch.ones_like(scale))
