"""IntegerCoding: binary coding with integer magnitudes, stored as an index and two scales.

    levels    scale * 2^(-scale_step * exponent) * (base + subset sums of `bits` positive integers)
    code      unsigned, `bits` bits; bit i adds step i of the coding
    coding    index into the shipped list of codings on a `grid_bits`-bit grid; log2(codings) bits a group
    exponent  unsigned, `scale_bits` bits a group
    scale     fp16, one a row

A binary coding with m free magnitudes a group costs 16 m bits a group. Here the magnitudes are integers on
a grid, the result of a linear quantization (the two steps of GPTQT), few integer codings matter, and
neighbouring groups differ little in scale: the defaults spend one byte a group, 5 bits of index and 3 of
exponent, so that groups of 32 are affordable. `merged` returns these numbers as plain binary coding.

Bits a weight: bits + (log2(codings) + scale_bits)/group_size + 16/columns.

Source: GPTQT (arXiv 2407.02891), abstract: linear quantization first, binary coding of its integers second,
a re-explored scale, both merged. The list, the exponents and the search are bitmill's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import ClassVar

import torch
from torch import Tensor

from bitmill import native
from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import as_stored
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat
from bitmill.numerics.codings import KEEP, bin_moments, levels_of, snap_table

# Ratio of the starting scale to a group's weighted root mean square, on a grid of one unit: where the best
# codings of Gaussian groups have it.  Found on synthetic groups; the search covers four exponents around.
_START = {1: 1.6, 2: 3.2, 3: 4.8, 4: 5.76}
_WINDOW = 4  # exponents tried to both sides of the start
_HEADROOM = 2  # exponents left above the start of the group of largest scale
_REACH = 4  # exponents by which a row's window may move from there, either way
_SLICE = 1 << 17


@FORMATS.register("integer_coding")
@dataclass(frozen=True)
class IntegerCoding(ScalarFormat):
    """Integer binary codings from a shipped list: one byte a group by default; `bits` 1 to 4."""

    grid_bits: int = 5
    codings: int = 32
    scale_bits: int = 3
    scale_step: float = 0.2  # octaves

    max_bits: ClassVar[int] = 4
    groups_independent: ClassVar[bool] = False  # the row's scale is shared by its groups

    def __post_init__(self) -> None:
        super().__post_init__()
        if f"{self.grid_bits},{self.bits}" not in _lists():
            choices = sorted(int(k[0]) for k in _lists() if k.endswith(f",{self.bits}"))
            raise RecipeError(f"grid_bits is {self.grid_bits!r}; with {self.bits} bits use one of {choices}.")
        if self.codings not in (1, 2, 4, 8, 16, 32, 64):
            raise RecipeError(f"codings is {self.codings!r}; use a power of two up to {KEEP}.")
        if not 1 <= self.scale_bits <= 8 or not 0 < self.scale_step <= 1:
            raise RecipeError(
                f"scale_bits is {self.scale_bits!r} and scale_step {self.scale_step!r}; use 1 to 8 bits and a "
                "step of up to 1 octave."
            )

    # -- choosing -----------------------------------------------------------------------------------------

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Choose row scale, exponents and codings of least weighted error: all pairs near the start are tried.

        Returns:
            "scale" (rows, 1), "exponent" and "coding" (rows, groups).
        """
        start = self._start(x, importance)
        scale = as_stored(start.amax(1, keepdim=True) * 2.0 ** (self.scale_step * _HEADROOM))
        exponent = self._exponent_near(start, scale)
        params = {"scale": scale, "exponent": exponent, "coding": torch.zeros_like(exponent)}
        if not search:
            return params
        count = 1 << self.scale_bits
        reach = min(count, _REACH)
        for cut in self._slices(x):
            weight = importance if importance.shape[0] == 1 else importance[cut]
            tried = [
                self._cheapest(x[cut], weight, scale[cut] * _power(self.scale_step, exponent))
                for exponent in range(-reach, count + reach)
            ]
            costs, codings = (torch.stack(part) for part in zip(*tried))  # (exponents, rows, groups)
            # each row takes the run of `count` exponents that serves its groups best
            first = costs.unfold(0, count, 1).amin(-1).sum(-1).argmin(0)  # (rows,)
            run = first + torch.arange(count, device=x.device)[:, None]
            costs = costs.gather(0, run[..., None].expand(-1, -1, costs.shape[2]))
            chosen = costs.argmin(0)  # (rows, groups)
            params["exponent"][cut] = chosen.to(torch.float32)
            params["coding"][cut] = codings.gather(0, (first[:, None] + chosen)[None])[0].to(torch.float32)
            shift = torch.exp2(-self.scale_step * (first - reach).to(torch.float32))
            params["scale"][cut] = as_stored(scale[cut] * shift[:, None])
        return params

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Choose exponent and coding of one group (rows, 1, width) at the row's scale.

        Returns:
            "scale" unchanged, "exponent" and "coding" (rows, 1).
        """
        return self._search(x, importance, params["scale"], self._start(x, importance))

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Choose the best exponent and coding for fixed codes: all pairs are tried."""
        weight = importance.expand(x.shape)
        empty = x.new_zeros(*x.shape[:-1], 1 << self.bits)
        mass = empty.scatter_add(-1, codes.long(), weight)
        moment = empty.scatter_add(-1, codes.long(), weight * x)
        table = self._table(x.device)
        best, chosen = None, dict(params)
        for exponent in range(1 << self.scale_bits):
            factor = params["scale"] * _power(self.scale_step, exponent)
            cost = mass @ table.square().T * factor[..., None] ** 2 - 2 * (moment @ table.T) * factor[..., None]
            least, coding = cost.min(-1)
            better = least < best if best is not None else torch.ones_like(least, dtype=torch.bool)
            best = least if best is None else torch.where(better, least, best)
            chosen["coding"] = torch.where(better, coding.float(), chosen["coding"])
            chosen["exponent"] = torch.where(better, float(exponent), chosen["exponent"])
        return chosen

    def _search(self, x: Tensor, importance: Tensor, scale: Tensor, start: Tensor) -> Params:
        near = self._exponent_near(start, scale)
        coding, exponent = torch.zeros_like(near), near.clone()
        for cut in self._slices(x):
            weight = importance if importance.shape[0] == 1 else importance[cut]
            best = torch.full(x[cut].shape[:2], torch.inf, device=x.device)
            for shift in range(-_WINDOW, _WINDOW + 1):
                trial = (near[cut] + shift).clamp(0, (1 << self.scale_bits) - 1)
                least, index = self._cheapest(x[cut], weight, scale[cut] * self._powers(trial))
                better = least < best
                best = torch.where(better, least, best)
                coding[cut] = torch.where(better, index.float(), coding[cut])
                exponent[cut] = torch.where(better, trial, exponent[cut])
        return {"scale": scale, "exponent": exponent, "coding": coding}

    def _cheapest(self, x: Tensor, importance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted error of the best coding of each group at the given scale, and its index."""
        cost_matrix = _costs(self.grid_bits, self.bits, self.codings, x.device)
        if x.device.type == "cpu" and native.unsupported_reason("cheapest_codings") is None:
            width, factor = x.shape[-1], factor.expand(x.shape[:-1])
            least, index = torch.empty(factor.shape), torch.empty(factor.shape, dtype=torch.int64)
            weight = importance.expand(-1, *x.shape[1:])
            given = [v.reshape(-1, width).contiguous() for v in (x, weight)]
            given += [factor.reshape(-1).contiguous(), cost_matrix]
            native.native().cheapest_codings(*given, least.view(-1), index.view(-1), native.threads())
            return least, index
        mass, moment = bin_moments(x / _divisor(factor), importance.expand(x.shape), self.grid_bits)
        least, index = (torch.cat([mass, moment], -1) @ cost_matrix).min(-1)
        return least * factor.square(), index

    def _slices(self, x: Tensor) -> list[slice]:
        """Return slices of rows whose temporaries stay in the cache."""
        step = max(1, _SLICE // max(1, x[0].numel()))
        return [slice(start, start + step) for start in range(0, x.shape[0], step)]

    def _start(self, x: Tensor, importance: Tensor) -> Tensor:
        """Return the scale to start from, (rows, groups)."""
        total = importance.sum(-1).clamp(min=1e-30)
        spread = ((x.square() * importance).sum(-1) / total).sqrt()
        return spread * _START[self.bits] * 2.0**-self.grid_bits

    def _exponent_near(self, start: Tensor, scale: Tensor) -> Tensor:
        octaves = torch.log2(scale.clamp(min=1e-30) / start.clamp(min=1e-30))
        return torch.round(octaves / self.scale_step).clamp(0, (1 << self.scale_bits) - 1)

    # -- meaning and storage ------------------------------------------------------------------------------

    def levels(self, params: Params) -> Tensor:
        """Return scale * 2^(-scale_step * exponent) * the coding's integers."""
        factor = params["scale"] * self._powers(params["exponent"])
        return factor[..., None] * self._table(factor.device)[self._coding(params)]

    def lookup(self, params: Params) -> Lookup:
        """Return the shipped codings, chosen by `coding`, times one of few powers."""
        device = params["scale"].device
        scale, exponent = params["scale"], params["exponent"].long()
        powers, zero = self._all_powers(device), torch.zeros_like(scale)
        return Lookup(self._table(device), scale, zero, self._coding(params), powers, exponent)

    def merged(self, params: Params) -> Params:
        """Return the levels as binary coding with an offset: alpha_i = S d_i / 2, beta = S (base + sum d / 2).

        These are fp64, in which the products and their sums are exact: rounded to fp32 they equal `levels` bit by
        bit.
        """
        factor = (params["scale"] * self._powers(params["exponent"])).double()
        entries = _entries(self.grid_bits, self.bits).to(factor.device)[self._coding(params)].double()
        steps = entries[..., 1:]
        return {
            "alpha": factor[..., None] * (steps / 2),
            "beta": factor * (entries[..., 0] + steps.sum(-1) / 2),
        }

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the fp16 row scale, the exponent, and the index of the coding (none when there is one)."""
        rows, groups = self.grid(shape)
        parts = (Part("scale", (rows, 1)), Part("exponent", (rows, groups), self.scale_bits))
        if self.codings == 1:
            return parts
        return (*parts, Part("coding", (rows, groups), self.codings.bit_length() - 1))

    def unpack_params(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Params:
        """Unpack the stored params; a single coding has index 0 everywhere."""
        params = super().unpack_params(tensors, shape)
        return params if self.codings > 1 else {**params, "coding": self._coding(params).to(torch.float32)}

    def _coding(self, params: Params) -> Tensor:
        """Return the index of each group's coding, int64, which is not stored if there is one coding."""
        return (params["exponent"] * 0 if self.codings == 1 else params["coding"]).long()

    def _table(self, device: torch.device) -> Tensor:
        """Return the integer levels, (codings, 2**bits) fp32."""
        return levels_of(_entries(self.grid_bits, self.bits)[: self.codings]).to(device)

    def _powers(self, exponent: Tensor) -> Tensor:
        return self._all_powers(exponent.device)[exponent.long()]

    def _all_powers(self, device: torch.device) -> Tensor:
        return torch.tensor([_power(self.scale_step, k) for k in range(1 << self.scale_bits)], device=device)


@cache
def _costs(grid_bits: int, bits: int, codings: int, device: torch.device) -> Tensor:
    """Return what a unit of mass and of moment in each bin costs with each coding, (2 * bins, codings)."""
    snapped = snap_table(levels_of(_entries(grid_bits, bits)[:codings]), grid_bits)
    return torch.cat([snapped.square(), -2 * snapped], 1).T.contiguous().to(device)


def _power(step: float, exponent: int) -> float:
    return 2.0 ** (-step * exponent)


def _divisor(factor: Tensor) -> Tensor:
    """Replace the scale 0 of a row of zeros by 1, which leaves its zeros unchanged."""
    return torch.where(factor > 0, factor, torch.ones_like(factor))[..., None]


@cache
def _lists() -> dict[str, list[list[int]]]:
    text = files("bitmill.formats").joinpath("data/codings.json").read_text(encoding="utf-8")
    lists: dict[str, list[list[int]]] = json.loads(text)
    return lists


@cache
def _entries(grid_bits: int, bits: int) -> Tensor:
    """Return the shipped codings, int64 (KEEP, 1 + bits): base, then steps."""
    return torch.tensor(_lists()[f"{grid_bits},{bits}"])
