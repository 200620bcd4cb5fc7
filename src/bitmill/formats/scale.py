"""What formats share whose stored numbers are a scale times something: its fit by RMS, its refit, its division."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats.base import Params
from bitmill.formats.grouped import GroupFormat, as_stored, weighted_error


def refit_scale(format: GroupFormat, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
    """Weighted least squares for params["scale"], which the stored numbers are multiples of, at fixed codes.

    Kept only where it helps, and where it is positive.
    """
    unit = format.decode(codes, {**params, "scale": torch.ones_like(params["scale"])})
    power = (unit.square() * importance).sum(-1)
    scale = as_stored((unit * x * importance).sum(-1) / power.clamp(min=1e-30))
    old = weighted_error(x, format.decode(codes, params), importance)
    new = weighted_error(x, format.decode(codes, {**params, "scale": scale}), importance)
    return {**params, "scale": torch.where((scale > 0) & (new < old), scale, params["scale"])}


def weighted_rms(x: Tensor, importance: Tensor) -> Tensor:
    """Root of each group's weighted mean square, (rows, groups); unweighted where no weight is positive."""
    weight = importance.expand(x.shape)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, torch.ones_like(weight))
    return ((x.square() * weight).sum(-1) / weight.sum(-1)).sqrt()


def over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is: all codes mean 0 there."""
    return torch.where(scale > 0, x / torch.where(scale > 0, scale, 1.0), 0.0)
