"""Formats that solvers can work with: verbs on grouped tensors, so that they never see a ragged edge or a file.

    x           (rows, groups, width)            the numbers to store
    importance  (rows|1, groups, width)          weight of each squared error, 0 on padding
    params      name -> (rows|1, groups|1, ...)  fp32 working values; size 1 means shared
    codes       (rows, groups, width / block * codes_per_block)   unsigned integers below 2**code_bits

A scalar format codes one column at a time from a small table. A vector format codes `block` columns jointly,
in `codes_per_block` integers. Laws:

    decode(nearest(decode(codes))) == decode(codes)            what is stored can be stored again
    nearest is the best code of brute force
    refit never raises the weighted error
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import Format, Params
from bitmill.formats.lookup import Lookup
from bitmill.numerics.grouping import GroupSize, group_grid, group_width, grouped, ungrouped

Rounder = Callable[[Tensor], tuple[Tensor, Tensor]]

# Importance-weighted searches run over slices of rows, so that their temporaries stay in the cache.
SLICE = 1 << 18


@dataclass(frozen=True)
class GroupFormat(Format):
    """Numbers in groups of input columns that share parameters."""

    bits: int
    group_size: GroupSize = 64

    block: ClassVar[int] = 1  # columns coded jointly
    max_bits: ClassVar[int] = 8
    groups_independent: ClassVar[bool] = True  # one group can be fitted without the rest of its row
    shareable: ClassVar[frozenset[str]] = frozenset()  # parts of one size for all matrices, which layers may share
    learned_codebooks: ClassVar[bool] = False  # a block is `scale` times a sum of vectors from `codebooks`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= self.max_bits:
            raise RecipeError(
                f"{self.name} stores 1 to {self.max_bits} bits, not {self.bits!r}; choose bits in that range."
            )
        size = self.group_size
        if isinstance(size, int) and (size < 1 or size % self.block):
            multiple = f" that is a multiple of {self.block}" if self.block > 1 else ""
            raise RecipeError(
                f"group_size is {size!r}; use a positive number of input columns{multiple}, 'row' or 'tensor'."
            )

    @property
    def core(self) -> GroupFormat:
        """Itself."""
        return self

    @property
    def stackable(self) -> bool:
        """Rows are apart unless the whole tensor is one group."""
        return self.group_size != "tensor"

    # -- meaning ------------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Parameters for x: the best found (`search`), or the format's closed-form start."""

    @abstractmethod
    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Codes (uint8; int32 above 8 bits) of the storable numbers closest to x."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The stored numbers, fp32 (rows, groups, width)."""

    @abstractmethod
    def rounder(self, params: Params) -> Rounder:
        """Fast rounding of one column, or block of columns, for the params of a single group (rows|1, 1, ...).

        Scalar formats: w (rows,) -> codes (rows,), values (rows,).
        Vector formats: w (rows, block) -> codes (rows, codes_per_block), values (rows, block).
        """

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Parameters for groups x (rows, groups, width), while what they share stays as in `params`."""
        return self.fit(x, importance)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Parameters of least weighted error for fixed codes; the same params where a format cannot do better."""
        return params

    @property
    def can_shift(self) -> bool:
        """Whether the levels of a group can be moved together."""
        return False

    def shift(self, params: Params, by: Tensor) -> Params:
        """Parameters whose levels lie higher by `by` (rows, groups), as far as can be stored; see `can_shift`."""
        raise NotImplementedError

    # -- storage ------------------------------------------------------------------------------------------

    @property
    def code_bits(self) -> int:
        """One code a column, of `bits` bits; vector formats say otherwise."""
        return self.bits

    @property
    def codes_per_block(self) -> int:
        """Codes that store one block of columns."""
        return 1

    def codes_in(self, columns: int) -> int:
        """Codes of a row: `codes_per_block` for every whole or ragged block."""
        return -(-columns // self.block) * self.codes_per_block

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, groups) of parameters for a matrix of `shape`."""
        return group_grid(shape, self.group_size, self.block)

    def width(self, shape: tuple[int, int]) -> int:
        """Columns of one group."""
        return group_width(shape, self.group_size, self.block)

    def dequantize(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """The stored matrix, fp32 of `shape`."""
        size = self.group_size
        if isinstance(size, int):
            size = min(size, self.width(shape)) // self.block * self.codes_per_block
        return ungrouped(self.decode(grouped(codes, size), params), shape)

    def dequantize_rows(self, tensors: dict[str, Tensor], shape: tuple[int, int], rows: Tensor) -> Tensor:
        """Some rows, int64 (n,), of a packed matrix of `shape`: fp32 (n, columns), at the cost of those rows."""
        return self.rows_of(self.unpack_codes(tensors["codes"][rows], shape[1]), tensors, shape, rows)

    def rows_of(self, codes: Tensor, tensors: dict[str, Tensor], shape: tuple[int, int], rows: Tensor) -> Tensor:
        """The same from the codes of those rows; of the packed tensors only the parameters are read."""
        if not rows.numel():
            return torch.empty(0, shape[1], device=rows.device)
        params = {part.name: part.unpack_rows(tensors[part.name], rows) for part in self.parts(shape)}
        return self.dequantize(codes, params, (rows.shape[0], shape[1]))


class ScalarFormat(GroupFormat):
    """A format whose every code is an entry of a small table: `levels(params)[code]`.

    This is what lets one lookup kernel run them all.
    """

    @abstractmethod
    def levels(self, params: Params) -> Tensor:
        """The table: (rows|1, groups|1, 2**bits) fp32, entry c is the value of code c."""

    def lookup(self, params: Params) -> Lookup:
        """The same levels as tables and factors; here a table for every group: formats with fewer override it."""
        levels = self.levels(params)
        which = torch.arange(levels.shape[0] * levels.shape[1], device=levels.device).view(levels.shape[:2])
        one = torch.ones(1, 1, device=levels.device)
        return Lookup(levels.flatten(0, 1), one, 0 * one, which)

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Count how many midpoints of the sorted table lie below x, then translate rank to code."""
        table, order = self.levels(params).sort(-1)
        middles = (table[..., 1:] + table[..., :-1]) / 2
        rank = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for k in range(middles.shape[-1]):
            rank += x > middles[..., k : k + 1]
        shape = (*x.shape[:-1], order.shape[-1])
        return order.expand(shape).gather(-1, rank).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Look every code up in its group's table."""
        table = self.levels(params)
        return table.expand(*codes.shape[:-1], table.shape[-1]).gather(-1, codes.long())

    def rounder(self, params: Params) -> Rounder:
        """Sort the table once; then a column costs one binary search and two lookups."""
        table, order = self.levels(params)[:, 0].sort(-1)
        middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            rank = torch.searchsorted(middles.expand(w.shape[0], -1).contiguous(), w[:, None].contiguous())
            rows = w.shape[0]
            codes = order.expand(rows, -1).gather(1, rank)[:, 0].to(torch.uint8)
            return codes, table.expand(rows, -1).gather(1, rank)[:, 0]

        return column


def alternate(format: GroupFormat, x: Tensor, importance: Tensor, params: Params, rounds: int) -> Params:
    """Take turns between the nearest codes for the parameters and the best parameters for the codes.

    The weighted error never rises, so every slice of rows stops at a local minimum, or after `rounds`.
    """

    def improve(x: Tensor, importance: Tensor, params: Params) -> Params:
        for _ in range(rounds):
            fitted = format.refit(x, format.nearest(x, params), importance, params)
            if all(torch.equal(fitted[name], params[name]) for name in params):
                break
            params = fitted
        return params

    return in_slices(improve, x, importance, params)


def in_slices(
    improve: Callable[[Tensor, Tensor, Params], Params], x: Tensor, importance: Tensor, params: Params
) -> Params:
    """`improve(x, importance, params)` a slice of rows at a time; what the rows share stays as it is."""
    pieces = []
    shared = {name for name, value in params.items() if value.shape[0] == 1 < x.shape[0]}
    for cut in _slices(x):
        weight = importance if importance.shape[0] == 1 else importance[cut]
        pieces.append(improve(x[cut], weight, {n: v if n in shared else v[cut] for n, v in params.items()}))
    return {n: v if n in shared else torch.cat([p[n] for p in pieces]) for n, v in params.items()}


def least_error(
    snap: Callable[[Tensor, Params], Tensor],
    x: Tensor,
    importance: Tensor,
    start: Params,
    trials: Iterable[Params],
) -> Params:
    """For every group the parameters of least weighted error: those of `start`, or of one of `trials`.

    snap: x and params to stored numbers.  A trial holds the parts that differ from `start`.
    """

    def error(params: Params) -> Tensor:
        pieces = []
        for cut in _slices(x):
            weight = importance if importance.shape[0] == 1 else importance[cut]
            piece = {name: v if v.shape[0] == 1 else v[cut] for name, v in params.items()}
            pieces.append(weighted_error(x[cut], snap(x[cut], piece), weight))
        return torch.cat(pieces)

    best, least = dict(start), error(start)
    for trial in trials:
        reached = error({**start, **trial})
        better = reached < least
        least = torch.where(better, reached, least)
        for name, value in trial.items():
            best[name] = torch.where(better, value, best[name])
    return best


def _slices(x: Tensor) -> list[slice]:
    step = max(1, SLICE // max(1, x[0].numel()))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def group_params(params: Params, group: int) -> Params:
    """The parameters of one group; parts shared along the row stay."""
    return {name: v if v.shape[1] == 1 else v[:, group : group + 1] for name, v in params.items()}


def as_stored(values: Tensor) -> Tensor:
    """Round to what fp16 storage keeps, within its range, as fp32; magnitudes below its smallest become 0."""
    return values.clamp(-65504, 65504).to(torch.float16).to(torch.float32)


def weighted_error(x: Tensor, y: Tensor, importance: Tensor) -> Tensor:
    """Importance-weighted squared error of each group, (rows, groups)."""
    return (x - y).square_().mul_(importance).sum(-1)


def positive(scale: Tensor) -> Tensor:
    """A group of zeros gets scale 1: any positive number stores it exactly. The smallest fp16 bounds the rest."""
    return torch.where(scale > 0, scale.clamp(min=2.0**-24), torch.ones_like(scale))
