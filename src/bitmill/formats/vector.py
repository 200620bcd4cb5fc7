"""Formats that code blocks of columns as a scale times a vector of one fixed set.

    scale  fp16, one a tensor, row or group

A member gives the set: how a vector is coded (`encode`) and what a code means (`points`), and the RMS of the
numbers that the set serves best.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.base import Params, Part
from bitmill.formats.grouped import GroupFormat, Rounder, as_stored, weighted_error
from bitmill.numerics.grouping import GroupSize

# Scales that the search tries, as shares of the one from the RMS; the first is that one.
_SHARES = (1.0, 0.8, 0.9, 1.1, 1.25, 1.5)
_SAMPLE = 1 << 15  # vectors that the search looks at, or 64 of a group


@dataclass(frozen=True)
class VectorFormat(GroupFormat):
    """W^ = scale * vector, block by block."""

    group_size: GroupSize = "row"

    rms: ClassVar[float]  # of numbers that the set is made for

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes (n, codes_per_block) of the vectors of the set closest to x (n, block) fp32."""

    @abstractmethod
    def points(self, codes: Tensor) -> Tensor:
        """The vectors (n, block) fp32 that codes (n, codes_per_block) mean."""

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """The scale that brings the (weighted) RMS to the set's; `search` tries others on a sample of blocks."""
        weight = importance.expand(x.shape)
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, torch.ones_like(weight))
        power = (x.square() * weight).sum(-1) / weight.sum(-1)
        start = power.sqrt() / self.rms
        best = as_stored(start)
        if not search:
            return {"scale": best}
        blocks = x.unflatten(-1, (-1, self.block))
        step = max(1, min(blocks[..., 0].numel() // _SAMPLE, blocks.shape[2] // 64))
        sample = blocks[:, :, ::step].flatten(2)
        weight = weight.unflatten(-1, (-1, self.block))[:, :, ::step].flatten(2)
        error = None
        for share in _SHARES:
            trial = {"scale": as_stored(start * share)}
            trial_error = weighted_error(sample, self.decode(self.nearest(sample, trial), trial), weight)
            if error is None:
                error = trial_error
            best = torch.where(trial_error < error, trial["scale"], best)
            error = torch.minimum(error, trial_error)
        return {"scale": best}

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Weighted least squares for the scale at fixed codes, kept only where it helps."""
        unit = self.decode(codes, {"scale": torch.ones_like(params["scale"])})
        power = (unit.square() * importance).sum(-1)
        scale = as_stored((unit * x * importance).sum(-1) / power.clamp(min=1e-30))
        trial = {"scale": scale}
        old = weighted_error(x, self.decode(codes, params), importance)
        better = (scale > 0) & (weighted_error(x, self.decode(codes, trial), importance) < old)
        return {"scale": torch.where(better, scale, params["scale"])}

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Codes of the closest vectors."""
        unit = _over(x, params["scale"][..., None])
        return self.encode(unit.reshape(-1, self.block)).reshape(*x.shape[:-1], -1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """scale * vector."""
        unit = self.points(codes.reshape(-1, self.codes_per_block)).reshape(*codes.shape[:-1], -1)
        return unit * params["scale"][..., None]

    def rounder(self, params: Params) -> Rounder:
        """Encode one block of columns."""
        scale = params["scale"][:, 0, None]

        def block(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = self.encode(_over(w, scale))
            return codes, self.points(codes) * scale

        return block

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """fp16 scale."""
        return (Part("scale", self.grid(shape)),)


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is: all codes mean 0 there."""
    return torch.where(scale > 0, x / torch.where(scale > 0, scale, 1.0), 0.0)
