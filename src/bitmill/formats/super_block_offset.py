"""Super-block with offsets: integer scales and minima of groups, W^ = (d * s) * code - (dmin * m).

    code     unsigned, `bits` bits
    s, m     unsigned, `scale_bits` bits, one of each a group
    d, dmin  fp16, one of each for every `groups` neighbouring groups of a row, a super-block

The levels of a group begin at or below 0. In super-blocks of 256 columns these are types of GGUF: Q2_K (2 bits in
16 groups of 16, scales of 4 bits), Q4_K and Q5_K (4 and 5 bits in 8 groups of 32, scales of 6). Bits a weight:
bits + 2 scale_bits/group_size + 32/(group_size * groups).

Source: ggml/src/ggml-quants.c of llama.cpp. How scales are chosen is bitmill's: the best line of each group, d and
dmin from the largest, then by turns the integers around the best ones and both numbers by weighted least squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.affine import Affine
from bitmill.formats.base import FORMATS, Format, Params, Rounder
from bitmill.formats.fitting import alternate, as_stored, in_slices, least_error, positive, weighted_error
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import Part, repeated, span_sums
from bitmill.formats.scalar import ScalarFormat
from bitmill.formats.signed_scale import SignedScale
from bitmill.formats.super_block import check_super_block, least_blocks, part_of_block
from bitmill.numerics.grouping import GroupSize

_ROUNDS = 4


@FORMATS.register("super_block_offset")
@dataclass(frozen=True)
class SuperBlockOffset(ScalarFormat):
    """Evenly spaced levels with integer scales and minima of groups, and fp16 scales of both; `bits` 1 to 8."""

    group_size: GroupSize = 32
    scale_bits: int = 6
    groups: int = 8

    groups_independent: ClassVar[bool] = False  # those of a super-block share d and dmin

    def __post_init__(self) -> None:
        super().__post_init__()
        check_super_block(self.name, self.scale_bits, self.groups)

    def for_columns(self, columns: int) -> Format:
        """Return a format in groups of 32, as llama.cpp has it, where rows are no whole blocks of 256."""
        if not part_of_block(self.group_size, self.groups, columns):
            return self
        if self.bits <= 3:
            return SignedScale(4, 32, "iq4_nl")
        return SignedScale(5, 32) if self.bits == 4 else Affine(self.bits, 32)

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Fit the range from minimum to maximum of each group, or search the line of least weighted error."""
        low, high = x.amin(-1).clamp(max=0), x.amax(-1)
        scale = (torch.maximum(high, low) - low) / ((1 << self.bits) - 1)
        start = self._stored(scale, low)
        return in_slices(self._searched, x, importance, start) if search else start

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Fit integers to groups at the present d and dmin."""
        line = self._ideal(x, importance)
        near = {**params, "scale": self._whole(line["scale"] / params["d"], 1)}
        near["minimum"] = self._whole(-line["offset"] / params["dmin"], 0)
        return least_error(self._snap, x, importance, near, self._neighbours(near))

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Take neighbouring integers where they lower the error of fixed codes."""
        least = weighted_error(x, self.decode(codes, params), importance)
        best = dict(params)
        for trial in self._neighbours(params):
            error = weighted_error(x, self.decode(codes, {**params, **trial}), importance)
            better, least = error < least, torch.minimum(error, least)
            best |= {name: torch.where(better, value, best[name]) for name, value in trial.items()}
        return best

    def levels(self, params: Params) -> Tensor:
        """Return (d * s) * (0..2**bits-1) - dmin * m."""
        return self._line.levels(self._of_line(params))

    def lookup(self, params: Params) -> Lookup:
        """Return the tables of the line."""
        return self._line.lookup(self._of_line(params))

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Round and clamp.

        Returns:
            uint8 (rows, groups, width).
        """
        return self._line.nearest(x, self._of_line(params))

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return x at its place between two levels."""
        return self._line.unrounded(x, self._of_line(params))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return the stored numbers.

        Returns:
            fp32 (rows, groups, width).
        """
        return self._line.decode(codes, self._of_line(params))

    def rounder(self, params: Params) -> Rounder:
        """Return a function that rounds and clamps one column."""
        return self._line.rounder(self._of_line(params))

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return scales and minima, and d and dmin of each super-block."""
        grid = self.grid(shape)
        return (
            Part("scale", grid, self.scale_bits),
            Part("minimum", grid, self.scale_bits),
            Part("d", grid, span=self.groups),
            Part("dmin", grid, span=self.groups),
        )

    # -- search -------------------------------------------------------------------------------------------

    @property
    def _line(self) -> Affine:
        """The format of the levels, with scale and offset of each group."""
        return Affine(self.bits, self.group_size, "float32")

    def _of_line(self, params: Params) -> Params:
        return {"scale": params["d"] * params["scale"], "offset": -(params["dmin"] * params["minimum"])}

    def _whole(self, values: Tensor, least: int) -> Tensor:
        return values.round().clamp(least, (1 << self.scale_bits) - 1)

    def _stored(self, scale: Tensor, offset: Tensor) -> Params:
        """Return parameters of lines, (rows, groups) each, offset <= 0."""
        top, count = (1 << self.scale_bits) - 1, scale.shape[1]
        d, dmin = (
            repeated(positive(as_stored(_largest(value, self.groups) / top)), self.groups, count)
            for value in (scale, -offset)
        )
        return {
            "scale": self._whole(scale / d, 1),
            "minimum": self._whole(-offset / dmin, 0),
            "d": d,
            "dmin": dmin,
        }

    def _searched(self, x: Tensor, importance: Tensor, start: Params) -> Params:
        """Improve the start by turns."""
        line = self._ideal(x, importance)
        params = self._stored(line["scale"], line["offset"])
        params = least_blocks(self._snap, x, importance, start, params, self.groups)
        for _ in range(_ROUNDS):
            before = params
            params = least_error(self._snap, x, importance, params, self._neighbours(params))
            params = self._with_best_d(x, importance, params)
            if all(torch.equal(before[name], params[name]) for name in params):
                break
        return params

    def _ideal(self, x: Tensor, importance: Tensor) -> Params:
        """Return the best line of each group whose first level is at or below 0, in fp32."""
        line = self._line
        low, high = x.amin(-1).clamp(max=0), x.amax(-1)
        ends = torch.cat(
            [low[..., None], torch.maximum(high, low)[..., None]], -1
        )  # as if 0 were among the numbers
        best = line.fit(torch.cat([x, ends], -1), torch.nn.functional.pad(importance, (0, 2)), search=True)
        best = alternate(line, x, importance, best, 2)
        over = best["offset"] > 0
        top = (1 << self.bits) - 1
        return {
            "scale": torch.where(over, best["scale"] + best["offset"] / top, best["scale"]),
            "offset": best["offset"].clamp(max=0),
        }

    def _neighbours(self, params: Params) -> Iterator[Params]:
        """Yield the integers around the present ones."""
        top = (1 << self.scale_bits) - 1
        for by, shift in product((0, -1, 1), repeat=2):
            if by or shift:
                yield {
                    "scale": (params["scale"] + by).clamp(1, top),
                    "minimum": (params["minimum"] + shift).clamp(0, top),
                }

    def _with_best_d(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit d and dmin of every super-block by weighted least squares at fixed codes and integers."""
        rise = self.nearest(x, params).float() * params["scale"][..., None]
        fall = -params["minimum"][..., None].expand(x.shape)

        def total(a: Tensor, b: Tensor) -> Tensor:
            return span_sums((a * b * importance).sum(-1).double(), self.groups)

        rr, rf, ff, rx, fx = (
            total(rise, rise),
            total(rise, fall),
            total(fall, fall),
            total(rise, x),
            total(fall, x),
        )
        determinant = rr * ff - rf * rf
        sound = determinant > 1e-9 * rr * ff
        divisor = torch.where(sound, determinant, 1.0)
        d = torch.where(sound, (rx * ff - fx * rf) / divisor, rx / rr.clamp(min=1e-30)).float()
        dmin = torch.where(sound, (fx * rr - rx * rf) / divisor, 0.0).float()
        count = x.shape[1]
        d, dmin = (repeated(as_stored(value), self.groups, count) for value in (d, dmin))
        fresh = {
            "d": torch.where(d > 0, d, params["d"]),
            "dmin": torch.where(dmin > 0, dmin, params["dmin"]),
        }
        return least_blocks(self._snap, x, importance, params, {**params, **fresh}, self.groups)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        return self.decode(self.nearest(x, params), params)


def _largest(values: Tensor, groups: int) -> Tensor:
    """Return the largest value of every super-block, (rows, super-blocks)."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % groups)).unflatten(1, (-1, groups)).amax(-1)
