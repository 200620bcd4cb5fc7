"""The contract of a storage format.

Verbs work on grouped tensors, so a format never sees a matrix, a ragged edge or a file:

    x           (rows, groups, width)            the numbers to store
    importance  (rows|1, groups, width)          weight of each squared error, 0 on padding
    params      name -> (rows|1, groups|1, ...)  fp32 working values; size 1 means shared
    codes       (rows, groups, width)            unsigned integers below 2**bits

Laws, tested for every registered format (tests/conformance/test_formats.py):

    decode(nearest(decode(codes))) == decode(codes)            what is stored can be stored again
    nearest is the best code of brute force
    refit never raises the weighted error
    unpack(pack(codes, params)) == (codes, params)             working values are already rounded as stored
    packed bytes * 8 == stored_bits(shape)                     honest bits
    repr and dict round-trip
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.fields import check_types
from bitmill.numerics.grouping import GroupSize, group_grid
from bitmill.numerics.packing import pack, unpack, words_for
from bitmill.registry import Registry

Params = dict[str, Tensor]
Rounder = Callable[[Tensor], tuple[Tensor, Tensor]]

FORMATS: Registry[type[Format]] = Registry("format", "bitmill.formats")

# Importance-weighted searches run over slices of rows, so that their temporaries stay in the cache.
SLICE = 1 << 18


@dataclass(frozen=True)
class Part:
    """How one parameter array is stored: floats (fp16, fp32 when `wide`), or unsigned integers of `bits` bits."""

    name: str
    shape: tuple[int, ...]  # (rows|1, groups|1, ...)
    bits: int | None = None  # None: floats
    wide: bool = False

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape on disk. Integers are packed along the rows, which leaves no holes in short group axes."""
        if self.bits is None:
            return self.shape
        return (words_for(self.shape[0], self.bits), *self.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Type on disk."""
        if self.bits is not None:
            return torch.int32
        return torch.float32 if self.wide else torch.float16


@dataclass(frozen=True)
class Format(ABC):
    """Base of all formats: a frozen dataclass whose fields are exactly what a reader needs to decode."""

    bits: int
    group_size: GroupSize = 64

    block: ClassVar[int] = 1  # columns coded jointly
    max_bits: ClassVar[int] = 8
    local: ClassVar[bool] = True  # parameters of one group can be fitted without seeing the rest of the row

    def __post_init__(self) -> None:
        check_types(self, self.name)
        if not 1 <= self.bits <= self.max_bits:
            raise RecipeError(
                f"{self.name} stores 1 to {self.max_bits} bits, not {self.bits!r}; choose bits in that range."
            )
        size = self.group_size
        if isinstance(size, int) and size < 1:
            raise RecipeError(
                f"group_size is {size!r}; use a positive number of input columns, 'row' or 'tensor'."
            )

    @property
    def name(self) -> str:
        """The registered name."""
        return FORMATS.name_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `format_from_dict` turns back into an equal format."""
        return {"format": self.name, **asdict(self)}

    # -- meaning ------------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Parameters for x: the best found (`search`), or the format's closed-form start."""

    @abstractmethod
    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Codes (uint8) of the storable numbers closest to x."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The stored numbers, fp32, in the shape of `codes`."""

    @abstractmethod
    def rounder(self, params: Params) -> Rounder:
        """Fast `w (rows,) -> codes (rows,), values (rows,)` for the params of a single group (rows|1, 1, ...)."""

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Parameters for one group, x (rows, 1, width), while what its row shares stays as in `params`."""
        return self.fit(x, importance)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Parameters of least weighted error for fixed codes; the same params where a format cannot do better."""
        return params

    @property
    def shifts(self) -> bool:
        """Whether the levels of a group can be moved together."""
        return False

    def shift(self, params: Params, by: Tensor) -> Params:
        """Parameters whose levels lie higher by `by` (rows, groups), as far as can be stored; see `shifts`."""
        raise NotImplementedError

    # -- storage ------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """The stored parameter arrays of a matrix of `shape` (rows, columns), codes not included."""

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, groups) of parameters for a matrix of `shape`."""
        return group_grid(shape, self.group_size)

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every tensor on disk."""
        tensors = {p.name: (p.packed_shape, p.dtype) for p in self.parts(shape)}
        return {"codes": ((shape[0], words_for(shape[1], self.bits)), torch.int32), **tensors}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits on disk of a matrix of `shape`, everything included."""
        total = 0
        for size, dtype in self.layout(shape).values():
            total += torch.Size(size).numel() * dtype.itemsize * 8
        return total

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """codes (rows, columns) and params as the tensors that `layout` names."""
        tensors = {"codes": pack(codes, self.bits)}
        for part in self.parts((codes.shape[0], codes.shape[1])):
            values = params[part.name]
            if part.bits is None:
                tensors[part.name] = values.to(part.dtype).contiguous()
            else:
                tensors[part.name] = pack(values.movedim(0, -1), part.bits).movedim(-1, 0).contiguous()
        return tensors

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        """Inverse of `pack`: codes (rows, columns) uint8 and fp32 params."""
        return unpack(tensors["codes"], self.bits, shape[1]), self.unpack_params(tensors, shape)

    def unpack_params(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Params:
        """The params alone, fp32."""
        params = {}
        for part in self.parts(shape):
            stored = tensors[part.name]
            if part.bits is not None:
                stored = unpack(stored.movedim(0, -1), part.bits, part.shape[0]).movedim(-1, 0)
            params[part.name] = stored.to(torch.float32)
        return params


class ScalarFormat(Format):
    """A format whose every code is an entry of a small table: `levels(params)[code]`.

    This is what lets one lookup kernel run them all.
    """

    @abstractmethod
    def levels(self, params: Params) -> Tensor:
        """The table: (rows|1, groups|1, 2**bits) fp32, entry c is the value of code c."""

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


def format_from_dict(data: dict[str, Any]) -> Format:
    """The format described by `Format.to_dict`. Raises RecipeError on unknown names or fields."""
    fields = dict(data)
    name = fields.pop("format", None)
    if not isinstance(name, str):
        raise RecipeError(f"A format needs the field 'format' with its name; found {data!r}.")
    kind = FORMATS.get(name)
    try:
        return kind(**fields)
    except TypeError as error:
        raise RecipeError(f"The format {name!r} cannot be built from {fields!r}: {error}.") from None


def alternate(format: Format, x: Tensor, importance: Tensor, params: Params, rounds: int) -> Params:
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
    step = max(1, SLICE // max(1, x[0].numel()))
    shared = {name for name, value in params.items() if value.shape[0] == 1 < x.shape[0]}
    for start in range(0, x.shape[0], step):
        cut = slice(start, start + step)
        weight = importance if importance.shape[0] == 1 else importance[cut]
        pieces.append(improve(x[cut], weight, {n: v if n in shared else v[cut] for n, v in params.items()}))
    return {n: v if n in shared else torch.cat([p[n] for p in pieces]) for n, v in params.items()}


def of_group(params: Params, group: int) -> Params:
    """The parameters of one group; parts shared along the row stay."""
    return {name: v if v.shape[1] == 1 else v[:, group : group + 1] for name, v in params.items()}


def as_stored(values: Tensor) -> Tensor:
    """Round to what fp16 storage keeps, within its range, as fp32; magnitudes below its smallest become 0."""
    return values.clamp(-65504, 65504).to(torch.float16).to(torch.float32)


def weighted_error(x: Tensor, y: Tensor, importance: Tensor) -> Tensor:
    """Importance-weighted squared error of each group, (rows, groups)."""
    return (x - y).square_().mul_(importance).sum(-1)


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
    best = dict(start)
    least = _sliced_error(snap, x, importance, best)
    for trial in trials:
        error = _sliced_error(snap, x, importance, {**start, **trial})
        better = error < least
        least = torch.where(better, error, least)
        for name, value in trial.items():
            best[name] = torch.where(better, value, best[name])
    return best


def _sliced_error(
    snap: Callable[[Tensor, Params], Tensor], x: Tensor, importance: Tensor, params: Params
) -> Tensor:
    pieces = []
    step = max(1, SLICE // max(1, x[0].numel()))
    for start in range(0, x.shape[0], step):
        cut = slice(start, start + step)
        piece = {name: v if v.shape[0] == 1 else v[cut] for name, v in params.items()}
        weight = importance if importance.shape[0] == 1 else importance[cut]
        pieces.append(weighted_error(x[cut], snap(x[cut], piece), weight))
    return torch.cat(pieces)


def positive(scale: Tensor) -> Tensor:
    """A group of zeros gets scale 1: any positive number stores it exactly. The smallest fp16 bounds the rest."""
    return torch.where(scale > 0, scale.clamp(min=2.0**-24), torch.ones_like(scale))
