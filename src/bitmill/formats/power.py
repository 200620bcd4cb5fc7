"""Power: evenly spaced levels of the power |w|^a, W^ = scale * sign(q) * (|q| / 2^(bits - 1))^(1 / a).

    code      unsigned, `bits` bits: q = code - 2^(bits - 1), one more negative than positive
    scale     fp16, one a group
    exponent  unsigned, 8 bits, in units of 1/128: a of the layer (per="layer"), or of each row (per="row")

With per="network" a is the field `exponent`, equal in all layers that have the format; where it is 0, a recipe is
quantized with the a of least squared error of all their weights. With a below 1 levels
crowd around 0, as weights do; a = 1 is the symmetric uniform grid. With a = 1/2 levels are sign(q) q^2 in units
of scale / 4^(bits - 1): integers that up to 4 bits fit into int8, so that products of weights and inputs in
such a format sum up in integers (see `quantized_inputs`). Codes are those of the nearest level; the authors
round |w|^a, whose error in w is larger. Bits a weight: bits + 16/group_size, and 8/columns (row).

Sources: Yvinec et al. 2023, "PowerQuant" (arXiv 2301.09858), for the powers, which are the maps of numbers that
keep products, and one exponent for a network, that of least error of its weights; Yvinec et al. 2023, "NUPES"
(arXiv 2308.05600), for exponents of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import as_stored, least_error, positive, refit_scale, weighted_error
from bitmill.formats.lookup import Lookup
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat
from bitmill.numerics.grouping import grouped
from bitmill.numerics.packing import unpack

UNITS = 128  # of an exponent of 1
DEFAULT = 0.5  # exponent where none is known yet
LEAST, MOST = 16, 255  # exponents in these units: 1/8 to nearly 2
_EXPONENTS = range(24, 161, 8)  # that a search tries: 3/16 to 5/4, where the error has one minimum
_SHARES = tuple(1 + k / 20 for k in range(-15, 4) if k)  # of the largest magnitude, for a given exponent
_EXPONENTS_OF_NETWORK = range(24, 161, 4)
_FEW_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)  # with every exponent
_SAMPLE = 1 << 15  # numbers of a matrix of which the exponent of a layer is searched


@FORMATS.register("power")
@dataclass(frozen=True)
class Power(ScalarFormat):
    """Integers to a power, times a scale per tensor, row or group; `bits` 2 to 8."""

    exponent: float = DEFAULT
    per: Literal["network", "layer", "row"] = "network"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise RecipeError(f"power has a sign and a magnitude, so 2 to 8 bits, not {self.bits!r}.")
        if not (LEAST <= self.exponent * UNITS <= MOST or self.exponent == 0):
            raise RecipeError(
                f"exponent is {self.exponent!r}; use a number from {LEAST / UNITS} to {MOST / UNITS}, such as "
                "0.5, or 0 for that of least error."
            )
        if self.per == "row" and self.group_size == "tensor":
            raise RecipeError(
                "An exponent a row needs a scale a row or group; use per=layer with group_size=tensor."
            )

    @property
    def groups_independent(self) -> bool:  # type: ignore[override]
        """False where groups share an exponent that is stored."""
        return self.per == "network"

    @property
    def stackable(self) -> bool:
        """True unless the rows of a layer share something."""
        return super().stackable and self.per != "layer"

    @property
    def learned_integers(self) -> frozenset[str]:
        """The exponent where it is stored."""
        return frozenset({"exponent"} if self.per != "network" else ())

    # -- the levels -----------------------------------------------------------------------------------------

    def unit_levels(self, exponent: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Return the levels of scale 1, rising with the code.

        Args:
            exponent: (rows|1, 1), in units of 1/128; None for the field.
            device: of the levels without `exponent`.

        Returns:
            fp32 (rows|1, 1, 2**bits).
        """
        if exponent is None:
            exponent = torch.full((1, 1), UNITS / self._root, dtype=torch.float64, device=device)
        half = 1 << (self.bits - 1)
        q = torch.arange(-half, half, dtype=torch.float64, device=exponent.device)
        # a stored exponent of 0, which is damage, must not divide
        power = UNITS / exponent.double().clamp(min=1)
        return (q.sign() * (q.abs() / half) ** power[..., None]).float()

    def _units(self, params: Params) -> Tensor:
        return self.unit_levels(params.get("exponent"), params["scale"].device)

    def levels(self, params: Params) -> Tensor:
        """Return the levels times the scale."""
        return params["scale"][..., None] * self._units(params)

    def lookup(self, params: Params) -> Lookup:
        """Return a table for every exponent."""
        scale, exponent = params["scale"], params.get("exponent")
        if exponent is None:
            return Lookup(self._units(params)[0], scale, torch.zeros_like(scale))
        different, which = exponent.unique(return_inverse=True)
        return Lookup(self.unit_levels(different[:, None])[:, 0], scale, torch.zeros_like(scale), which)

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Divide by the scale and count the middles of levels below.

        Returns:
            uint8 (rows, groups, width).
        """
        units = self._units(params)
        middles = (units[..., 1:] + units[..., :-1]) / 2
        y = (x / params["scale"][..., None]).contiguous()
        if middles.shape[0] == 1:
            return torch.bucketize(y, middles[0, 0]).to(torch.uint8)
        code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for k in range(middles.shape[-1]):
            code += torch.gt(y, middles[..., k : k + 1]).view(torch.uint8)
        return code

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Look codes up and multiply by the scale.

        Returns:
            fp32 (rows, groups, width).
        """
        units = self._units(params)
        if units.shape[0] == 1:
            found = units[0, 0].index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
        else:
            found = units.expand(*codes.shape[:-1], -1).gather(-1, codes.long())
        return found.mul_(params["scale"][..., None])

    @property
    def _root(self) -> float:
        """1 / a of the network."""
        return 1 / (self.exponent or DEFAULT)

    @property
    def arithmetic(self) -> Literal["integer"] | None:
        """Integers where those to the power 1 / a are, and fit into 8 bits: 4 bits with a = 1/2, 8 with a = 1."""
        largest = float(1 << (self.bits - 1)) ** self._root
        whole = self.per == "network" and self._root == round(self._root) and largest <= 128
        return "integer" if whole else None

    def integers(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the signed powers of the integers; the scale is that of the largest."""
        largest = float(1 << (self.bits - 1)) ** self._root
        table = (self._units(params).flatten() * largest).to(torch.int8)
        return table[codes.long()], params["scale"] / largest, None

    # -- fitting --------------------------------------------------------------------------------------------

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Map the largest magnitude to the largest level, with the exponent of the field.

        With `search` exponents that are stored are those of least weighted error, and so are then the scales.

        Returns:
            "scale" (rows, groups), and "exponent" (1, 1) with per="layer", (rows, 1) with per="row".
        """
        exponents: Params = {}
        if self.per != "network":
            rows = 1 if self.per == "layer" else x.shape[0]
            start = torch.full((rows, 1), round(UNITS / self._root), dtype=torch.float32, device=x.device)
            exponents = {"exponent": self._least(x, importance, start) if search else start}
        return self._fit_scale(x, importance, exponents, search)

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Search the scale of one group (rows, 1, width); exponents stay."""
        return self._fit_scale(x, importance, {k: v for k, v in params.items() if k == "exponent"}, True)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the scale at fixed codes by weighted least squares, kept where that helps."""
        return refit_scale(self, x, codes, importance, params)

    def _fit_scale(self, x: Tensor, importance: Tensor, exponents: Params, search: bool) -> Params:
        start = {**exponents, "scale": self._covering(x, exponents, 1.0)}
        if not search:
            return start
        trials = ({"scale": self._covering(x, exponents, share)} for share in _SHARES)
        return least_error(self._snap, x, importance, start, trials)

    def _covering(self, x: Tensor, exponents: Params, share: float) -> Tensor:
        """Return the scale that maps a share of the largest magnitude of each group to the largest level."""
        largest = self.unit_levels(exponents.get("exponent"), x.device)[..., -1]
        return positive(as_stored(x.abs().amax(-1) * (share / largest)))

    def _least(self, x: Tensor, importance: Tensor, start: Tensor) -> Tensor:
        """Return the exponents of least weighted error of their rows or layer, "start" (rows|1, 1) included."""
        if self.per == "layer":
            taken = _sample(x)
            importance = importance[taken] if importance.numel() == x.numel() else importance
            x = x[taken]
        best, least = start, self._error_of_exponents(x, importance, start)
        for exponent in _EXPONENTS:
            trial = torch.full_like(start, exponent)
            error = self._error_of_exponents(x, importance, trial)
            best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
        return best

    def _error_of_exponents(self, x: Tensor, importance: Tensor, exponent: Tensor) -> Tensor:
        """Return the weighted errors of rows or layer with their exponents, (rows|1, 1) as these."""
        error = self._errors_of(x, importance, {"exponent": exponent}).sum(1, keepdim=True)
        return error if self.per == "row" else error.sum(0, keepdim=True)

    def _errors_of(self, x: Tensor, importance: Tensor, exponents: Params) -> Tensor:
        """Return the weighted error of every group (rows, groups), with the best of a few scales."""
        start = {**exponents, "scale": self._covering(x, exponents, 1.0)}
        trials = ({"scale": self._covering(x, start, share)} for share in _FEW_SHARES[1:])
        best = least_error(self._snap, x, importance, start, trials)
        return weighted_error(x, self._snap(x, best), importance)

    def _snap(self, x: Tensor, params: Params) -> Tensor:
        return self.decode(self.nearest(x, params), params)

    def of_network(self, matrices: Callable[[], Iterable[Tensor]]) -> Power:
        """Return the format with the exponent of least squared error of all matrices, where it has none yet."""
        if self.exponent or self.per != "network":
            return self
        tried = [exponent / UNITS for exponent in _EXPONENTS_OF_NETWORK]
        errors = torch.zeros(len(tried), dtype=torch.float64)
        for W in matrices():
            whole = grouped(W.to(torch.float32), self.group_size)
            x = whole[_sample(whole)]
            for at, exponent in enumerate(tried):
                error = replace(self, exponent=exponent)._errors_of(x, x.new_ones(1, 1, 1), {})
                errors[at] += float(error.sum()) * whole.numel() / x.numel()
        return replace(self, exponent=tried[int(errors.argmin())])

    # -- storage --------------------------------------------------------------------------------------------

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the fp16 scale, and exponents in 8 bits unless they are the field."""
        scale = Part("scale", self.grid(shape))
        if self.per == "network":
            return (scale,)
        return scale, Part("exponent", (shape[0] if self.per == "row" else 1, 1), 8)

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return that an exponent is smaller than any encoder stores."""
        if self.per != "network":
            rows = shape[0] if self.per == "row" else 1
            if bool((unpack(tensors["exponent"].movedim(0, -1), 8, rows) < LEAST).any()):
                return f"its exponent is below {LEAST} units"
        return super().damage_reason(tensors, shape)


def _sample(x: Tensor) -> tuple[slice, ...]:
    """Return the place of some rows of x (rows, groups, width), and of a single group that of some numbers."""
    every = slice(None, None, -(-x.numel() // _SAMPLE))
    return (every,) if x.shape[0] > 1 else (slice(None), slice(None), every)
