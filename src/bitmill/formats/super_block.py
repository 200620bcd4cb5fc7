"""Super-block: groups with integer scales, and one fp16 scale for several groups, W^ = d * s * table[code].

    code   unsigned, `bits` bits
    s      signed, `scale_bits` bits, one a group, never 0; stored with 2**(scale_bits-1) added
    d      fp16, one for each `groups` neighbouring groups of a row, a super-block
    table  "even" -2**(bits-1) .. 2**(bits-1) - 1, or "iq4_nl", 16 numbers that lie closer around 0

Small groups become affordable, since their scales take a few bits. In super-blocks of 256 columns these are types
of GGUF: Q3_K (3 bits in 16 groups of 16, scales of 6 bits), Q6_K (6 bits, scales of 8), and IQ4_XS ("iq4_nl" in 8
groups of 32, scales of 6). Bits a weight: bits + scale_bits/group_size + 16/(group_size * groups).

Source: ggml/src/ggml-quants.c of llama.cpp. How scales are chosen is bitmill's: the best factor of each group, d
from the largest, then by turns the integers around the best ones and d by weighted least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Format, Params
from bitmill.formats.fitting import in_slices, least_error, weighted_error
from bitmill.formats.part import Part, repeated, span_sums
from bitmill.formats.signed_scale import SignedScale, SignedTable, signed
from bitmill.numerics.grouping import GroupSize

_ROUNDS = 4
BLOCK = 256  # columns of a super-block of GGUF


@FORMATS.register("super_block")
@dataclass(frozen=True)
class SuperBlock(SignedTable):
    """A table with integer scales of groups and an fp16 scale of each super-block; `bits` 2 to 8."""

    scale_bits: int = 6
    groups: int = 8

    groups_independent: ClassVar[bool] = False  # those of a super-block share d

    def __post_init__(self) -> None:
        super().__post_init__()
        check_super_block(self.name, self.scale_bits, self.groups)

    def for_columns(self, columns: int) -> Format:
        """Return a format in groups of 32, as llama.cpp has it, where rows are no whole blocks of 256."""
        if not part_of_block(self.group_size, self.groups, columns):
            return self
        return SignedScale(4, 32, "iq4_nl") if self.bits <= 4 else SignedScale(8, 32)

    def factor(self, params: Params) -> Tensor:
        """Return d * s."""
        return params["d"] * (params["scale"] - self._middle)

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Return d and scales of the largest numbers, or those of least weighted error found by turns."""
        start = self.start(x)
        if not search:
            return start
        return in_slices(self._searched, x, importance, start)

    def start(self, x: Tensor) -> Params:
        """Map the largest number of each group to the first of the table."""
        return self._stored(self.ideal_start(x))

    def start_group(self, x: Tensor, params: Params) -> Params:
        """Return the scales of the largest numbers at the present d."""
        return self.with_factor(self.ideal_start(x), params)

    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Store the nearest scale.

        Returns:
            "scale" (rows, groups), with the middle added.
        """
        return {"scale": self._biased(factor / params["d"])}

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the scales, and d of each super-block."""
        grid = self.grid(shape)
        return Part("scale", grid, self.scale_bits), Part("d", grid, span=self.groups)

    # -- search -------------------------------------------------------------------------------------------

    @property
    def _middle(self) -> int:
        return 1 << (self.scale_bits - 1)

    def _biased(self, scale: Tensor) -> Tensor:
        """Return integers, none of them 0, with the middle added."""
        rounded = scale.round().clamp(-self._middle, self._middle - 1)
        one = torch.where(scale < 0, -1.0, 1.0)
        return torch.where(rounded == 0, one, rounded) + self._middle

    def _stored(self, factor: Tensor) -> Params:
        """Return parameters of factors (rows, groups): the largest of a super-block has the lowest scale."""
        blocks = torch.nn.functional.pad(factor, (0, -factor.shape[1] % self.groups)).unflatten(
            1, (-1, self.groups)
        )
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
        d = repeated(signed(largest / -self._middle), self.groups, factor.shape[1])
        return {"scale": self._biased(factor / d), "d": d}

    def _searched(self, x: Tensor, importance: Tensor, start: Params) -> Params:
        """Improve the start by turns."""
        params = self._stored(self._ideal(x, importance))
        params = least_blocks(self._snap, x, importance, start, params, self.groups)
        for _ in range(_ROUNDS):
            before = params
            trials = ({"scale": self._moved(params["scale"], by)} for by in (-1, 1, -2, 2))
            params = least_error(self._snap, x, importance, params, trials)
            params = self._with_best_d(x, importance, params)
            if all(torch.equal(before[name], params[name]) for name in params):
                break
        return params

    def _ideal(self, x: Tensor, importance: Tensor) -> Tensor:
        """Return the best factor of each group, not rounded."""
        start = self.ideal_start(x)
        table = self._table(x.device)

        def snap(x: Tensor, params: Params) -> Tensor:
            factor = torch.where(params["factor"] == 0, 1.0, params["factor"])[..., None]
            return table.rounded(x / factor).mul_(factor)

        trials = ({"factor": start * share} for share in self.shares)
        best = least_error(snap, x, importance, {"factor": start}, trials)["factor"]
        steps = table.rounded(x / torch.where(best == 0, 1.0, best)[..., None])
        power = (steps.square() * importance).sum(-1)
        return torch.where(power > 0, (steps * x * importance).sum(-1) / power.clamp(min=1e-30), best)

    def _moved(self, scale: Tensor, by: int) -> Tensor:
        moved = (scale + by).clamp(0, 2 * self._middle - 1)
        return torch.where(moved == self._middle, scale, moved)

    def _with_best_d(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit d of every super-block by weighted least squares at fixed codes and scales."""
        steps = self._table(x.device).lookup(self.nearest(x, params)) * (params["scale"] - self._middle)[..., None]
        power = span_sums((steps.square() * importance).sum(-1), self.groups)
        best = span_sums((steps * x * importance).sum(-1), self.groups) / power.clamp(min=1e-30)
        d = repeated(signed(best), self.groups, params["d"].shape[1])
        return least_blocks(self._snap, x, importance, params, {**params, "d": d}, self.groups)


def part_of_block(group_size: GroupSize, groups: int, columns: int) -> bool:
    """Return True where super-blocks have 256 columns, as those of GGUF, and rows are not whole ones."""
    return isinstance(group_size, int) and group_size * groups == BLOCK and columns % BLOCK != 0


def check_super_block(name: str, scale_bits: int, groups: int) -> None:
    """Raise RecipeError for bits of scales beyond 4 to 8, or super-blocks without a group."""
    if not 4 <= scale_bits <= 8:
        raise RecipeError(f"scale_bits of {name} is {scale_bits!r}; use 4 to 8.")
    if groups < 1:
        raise RecipeError(f"groups of {name} is {groups!r}; use 1 or more groups in a super-block.")


def least_blocks(
    snap: Callable[[Tensor, Params], Tensor], x: Tensor, importance: Tensor, old: Params, new: Params, groups: int
) -> Params:
    """Return for every super-block the parameters of less weighted error, `old` where both are alike.

    Args:
        snap: maps x and params to stored numbers.
        x: (rows, groups, width).
        importance: (rows|1, groups, width).
        old, new: (rows, groups) each.
        groups: of a super-block.
    """
    errors = [span_sums(weighted_error(x, snap(x, params), importance), groups) for params in (old, new)]
    better = repeated(errors[1] < errors[0], groups, x.shape[1])
    return {name: torch.where(better, new[name], value) for name, value in old.items()}
