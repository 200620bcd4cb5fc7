"""Levels on a logarithmic scale, for numbers of one sign: x^ = scale * (m(code) / M * 2^-e(code) - zero).

    code    unsigned, `bits` bits; the last one stores -scale * zero, code k the k-th power of the base
    e       floor(k q / r), the shift of an integer decoder;  m = round(M * 2^(-(k q mod r) / r)), its multiplier
    M       2^(bits + 1) - 2, so that multipliers have bits + 1 bits
    base    2^(q / r): q unsigned, 8 bits, one a group, and r = 37 (adalog); q / r = 1 (log2) or 1 / 2 (log_sqrt2)
    scale   fp16, one a group: the largest level above the zero
    zero    fp16, one a group, in units of the scale: 0 where no number is negative, else that of the smallest one

An integer decoder multiplies by m and shifts right by e, see `integer_tables`: two tables of 2^bits entries. As
inputs, levels are integers m 2^(E - e), E the largest shift, of one to seven bytes, which multiply byte by byte.
Levels under 2^-LONGEST of the scale are 0. Bits a weight: bits + 40/group_size (adalog), bits + 32/group_size.

Source: Wu et al. 2024, "AdaLog" (arXiv 2407.12951), section 3.2; log_sqrt2 as in Li et al. 2023, "RepQ-ViT" (arXiv
2212.08254). There codes are rounded in the logarithm; here to the nearest level, whose squared error is never
larger. There codes above the last one mean 0; here 0 has a code of its own. q is 1 to 255, where the authors' code
takes 10 to 137: at 8 bits the best bases are closer to 1.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params, Rounder
from bitmill.formats.fitting import as_stored, positive
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat

LONGEST = 40  # shift of an integer decoder, with which products of 9-bit multipliers stay in 64 bits
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the range that a search tries
_ROUNDS = 8  # scales next to a parameter, in a search
_LARGEST_ZERO = 60_000.0  # in fp16


@dataclass(frozen=True)
class Logarithm(ScalarFormat):
    """Powers of a base, and 0."""

    denominator: ClassVar[int]  # r
    one_sided: ClassVar[bool] = True

    @abstractmethod
    def numerator(self, params: Params) -> Tensor:
        """Return q, fp32 (rows, groups)."""

    @property
    def multiplier(self) -> int:
        """The multiplier M of code 0."""
        return (2 << self.bits) - 2

    def integer_tables(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return multiplier m and shift e of every code, int64 (rows, groups, 2**bits); those of 0 are 0."""
        q = self.numerator(params).to(torch.int64)
        exponent = torch.arange(1 << self.bits, device=q.device) * q[..., None]
        shift = exponent // self.denominator
        mantissa = torch.exp2(-(exponent % self.denominator).double() / self.denominator)
        multiplier = (mantissa * self.multiplier).round().to(torch.int64)
        unused = shift > LONGEST
        unused[..., -1] = True
        return multiplier.masked_fill(unused, 0), shift.masked_fill(unused, 0)

    @property
    def input_arithmetic(self) -> Literal["integer"] | None:
        """Integers where a row has one scale."""
        return "integer" if self.group_size in ("row", "tensor") else None

    def integer_digits(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the digits of m 2^(E - e)."""
        multiplier, shift = (table[:, 0] for table in self.integer_tables(params))
        longest = int(shift.max())
        rest, tables = multiplier << (longest - shift), list[Tensor]()
        while bool(rest.any()):
            digit = ((rest + 128) & 255) - 128  # from -128 to 127
            tables.append(digit.to(torch.int8))
            rest = (rest - digit) >> 8
        table = torch.stack(tables)
        unit = self.multiplier * 2.0**longest
        scale, zero = params["scale"] / unit, params["zero"] * unit
        if table.shape[1] == 1:
            index = codes.int()
            return torch.stack([one[0][index] for one in table]), scale, zero
        index = codes.long().expand(len(tables), *codes.shape)
        digits = table.expand(-1, codes.shape[0], -1).gather(-1, index)
        return digits, scale, zero

    def powers(self, params: Params) -> Tensor:
        """Return m / M * 2^-e, fp32 (rows, groups, 2**bits); integers over a power of two, rounded once."""
        multiplier, shift = self.integer_tables(params)
        return (((multiplier << LONGEST) >> shift).double() / (self.multiplier * 2.0**LONGEST)).float()

    def levels(self, params: Params) -> Tensor:
        """Return scale * (m / M * 2^-e - zero)."""
        return params["scale"][..., None] * (self.powers(params) - params["zero"][..., None])

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Search the sorted table.

        Returns:
            uint8 (rows, groups, width).
        """
        edges, order = self._edges(params)
        x = x.contiguous()
        if edges.shape[0] == edges.shape[1] == 1:
            return order[0, 0][torch.bucketize(x, edges[0, 0])]
        rows = max(x.shape[0], edges.shape[0])
        spread = edges.expand(rows, x.shape[1], -1).contiguous()
        rank = torch.searchsorted(spread, x.expand(rows, -1, -1).contiguous())
        return order.expand(rows, x.shape[1], -1).gather(-1, rank)

    def rounder(self, params: Params) -> Rounder:
        """Sort the table once; then a column costs one binary search and two lookups."""
        edges, order = (part[:, 0] for part in self._edges(params))
        table = self.levels(params)[:, 0]

        def column(w: Tensor) -> tuple[Tensor, Tensor]:
            rows = w.shape[0]
            rank = torch.searchsorted(edges.expand(rows, -1).contiguous(), w[:, None].contiguous())
            codes = order.expand(rows, -1).gather(1, rank)
            return codes[:, 0], table.expand(rows, -1).gather(1, codes.long())[:, 0]

        return column

    def _edges(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return the rising edges between levels (rows, groups, 2**bits - 1), and the code above each, uint8."""
        table, order = self.levels(params).sort(-1)
        middles = (table[..., 1:] + table[..., :-1]) / 2
        # of two adjacent floats the middle is rounded to one of them, and must not be the upper one
        below = torch.nextafter(table[..., 1:], torch.full_like(middles, -torch.inf))
        return torch.minimum(middles, below).contiguous(), order.to(torch.uint8)

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Cover all numbers; with `search` by the base of least error, and one of a few ranges.

        Returns:
            "scale" and "zero" (rows, groups), and parts of the base.
        """
        low = (-x.amin(-1)).clamp(min=0)
        scale = low + x.amax(-1)
        start = self.with_base(self._covering(low, scale), self.denominator)
        if not search:
            return start
        best, error = start, self._error(x, importance, start)
        for share in _SHARES:
            for q in self.bases():
                trial = self.with_base(self._covering(low, scale * share), q)
                found = self._error(x, importance, trial)
                better = found < error
                error = torch.where(better, found, error)
                best = {name: torch.where(better, value, best[name]) for name, value in trial.items()}
        return best

    def _covering(self, low: Tensor, scale: Tensor) -> Params:
        """Return the stored parameters of levels from -low over a range of `scale`."""
        scale = positive(as_stored(scale))
        return {"scale": scale, "zero": as_stored((low / scale).clamp(max=_LARGEST_ZERO))}

    def _error(self, x: Tensor, importance: Tensor, params: Params) -> Tensor:
        return ((self.decode(self.nearest(x, params), params) - x).square() * importance).sum(-1)

    def bases(self) -> tuple[int, ...]:
        """Return the numerators q that a fit tries."""
        return (self.denominator,)

    def with_base(self, params: Params, q: int) -> Params:
        """Return scale and zero with the parts of a base."""
        return params

    def static_candidates(self, x: Tensor) -> Params:
        """Return parameters that cover the numbers, or shares of their range, with every base.

        Args:
            x: any shape.

        Returns:
            "scale", "zero" and parts of the base, (candidates, 1) each.
        """
        low = (-x.amin()).clamp(min=0)
        one = self._covering(low, (x.amax() + low) * torch.tensor(_SHARES, device=x.device)[:, None])
        trials = [self.with_base(one, q) for q in self.bases()]
        return {name: torch.cat([trial[name] for trial in trials]) for name in trials[0]}

    def static_neighbours(self, params: Params, step: float) -> Params:
        """Return parameters with scales within a relative step of that of one group, (candidates, 1) each."""
        factors = 1 + step * torch.linspace(-1, 1, _ROUNDS, device=params["scale"].device)[:, None]
        moved = self._covering(params["scale"] * params["zero"], params["scale"] * factors)
        return {name: moved.get(name, value.expand_as(factors)) for name, value in params.items()}

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return fp16 scale and zero."""
        grid = self.grid(shape)
        return Part("scale", grid), Part("zero", grid)


@FORMATS.register("adalog")
@dataclass(frozen=True)
class AdaLog(Logarithm):
    """Powers of a base of its own for every group, 2^(1/37) to 2^(255/37)."""

    denominator = 37

    def numerator(self, params: Params) -> Tensor:
        """Return q."""
        return params["base"]

    def bases(self) -> tuple[int, ...]:
        """Return 24 numerators, closer to each other where they are small."""
        return tuple(sorted({round(255 ** (k / 31)) for k in range(32)}))

    def with_base(self, params: Params, q: int) -> Params:
        """Add the numerator, "base"."""
        return {**params, "base": torch.full_like(params["scale"], q)}

    def static_candidates(self, x: Tensor) -> Params:
        """Return as `Logarithm.static_candidates`, with all bases up to 2^(137/37)."""
        first = super().static_candidates(x)
        few = {name: value[: len(_SHARES)] for name, value in first.items()}
        trials = [self.with_base({"scale": few["scale"], "zero": few["zero"]}, q) for q in range(1, 138)]
        return {name: torch.cat([trial[name] for trial in trials]) for name in trials[0]}

    def static_neighbours(self, params: Params, step: float) -> Params:
        """Return neighbours in the scale, each with the base and the two next to it."""
        scales = super().static_neighbours(params, step)
        moved = [{**scales, "base": (scales["base"] + by).clamp(1, 255)} for by in (-1, 0, 1)]
        return {name: torch.cat([trial[name] for trial in moved]) for name in scales}

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return fp16 scale and zero, and the base in 8 bits."""
        return (*super().parts(shape), Part("base", self.grid(shape), 8))


@FORMATS.register("log2")
@dataclass(frozen=True)
class Log2(Logarithm):
    """Powers of 2."""

    denominator = 1

    def numerator(self, params: Params) -> Tensor:
        """Return 1."""
        return torch.ones_like(params["scale"])


@FORMATS.register("log_sqrt2")
@dataclass(frozen=True)
class LogSqrt2(Logarithm):
    """Powers of the square root of 2."""

    denominator = 2

    def numerator(self, params: Params) -> Tensor:
        """Return 1."""
        return torch.ones_like(params["scale"])
