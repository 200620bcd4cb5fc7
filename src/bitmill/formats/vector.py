"""Formats that code blocks of columns as a scale times a vector of one fixed set.

    scale  fp16, one a tensor, row or group

A member defines the set: how a vector is coded (`encode`), how a code decodes (`points`), and the RMS of the
numbers that the set suits best.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bitmill.formats.base import GroupFormat, Params, Rounder
from bitmill.formats.fitting import as_stored, divide_or_zero, least_error, refit_scale, weighted_rms
from bitmill.formats.part import Part
from bitmill.numerics.grouping import GroupSize

# Scales that the search tries besides the one from the RMS, as shares of it.
_SHARES = (0.8, 0.9, 1.1, 1.25, 1.5)
_SAMPLE = 1 << 15  # vectors that the search looks at, or 64 of a group


@dataclass(frozen=True)
class VectorFormat(GroupFormat):
    """W^ = scale * vector, block by block."""

    group_size: GroupSize = "row"

    rms: ClassVar[float]  # of numbers that the set is made for

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes (n, codes_per_block) of the vectors of the set closest to x (n, block) fp32."""

    @abstractmethod
    def points(self, codes: Tensor) -> Tensor:
        """Return the vectors (n, block) fp32 of codes (n, codes_per_block)."""

    def snap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of the closest vectors, and these vectors."""
        codes = self.encode(x)
        return codes, self.points(codes)

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Bring the (weighted) RMS to the set's; `search` tries other scales on a sample of blocks.

        Returns:
            "scale" (rows, groups).
        """
        start = weighted_rms(x, importance) / self.rms
        params = {"scale": as_stored(start)}
        if not search:
            return params
        blocks = x.unflatten(-1, (-1, self.block))
        step = max(1, min(blocks[..., 0].numel() // _SAMPLE, blocks.shape[2] // 64))
        weight = importance.unflatten(-1, (-1, self.block))[:, :, ::step].flatten(2)
        trials = ({"scale": as_stored(start * share)} for share in _SHARES)
        return least_error(self._snap, blocks[:, :, ::step].flatten(2), weight, params, trials)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the scale at fixed codes by weighted least squares, kept only where it lowers the error."""
        return refit_scale(self, x, codes, importance, params)

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Return the codes of the closest vectors.

        Returns:
            (rows, groups, width / block * codes_per_block).
        """
        unit = divide_or_zero(x, params["scale"][..., None])
        return self.encode(unit.reshape(-1, self.block)).reshape(*x.shape[:-1], -1)

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return scale * (x / scale)."""
        scale = params["scale"][..., None]
        return divide_or_zero(x.detach(), scale.detach()) * scale

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return scale * vector.

        Returns:
            fp32 (rows, groups, width).
        """
        unit = self.points(codes.reshape(-1, self.codes_per_block)).reshape(*codes.shape[:-1], -1)
        return unit * params["scale"][..., None]

    def rounder(self, params: Params) -> Rounder:
        """Return a function that encodes one block of columns."""
        scale = params["scale"][:, 0, None]

        def block(w: Tensor) -> tuple[Tensor, Tensor]:
            codes, vectors = self.snap(divide_or_zero(w, scale))
            return codes, vectors * scale

        return block

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the fp16 scale."""
        return (Part("scale", self.grid(shape)),)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        scale = params["scale"][..., None]
        return self.snap(divide_or_zero(x, scale).reshape(-1, self.block))[1].reshape(x.shape) * scale
