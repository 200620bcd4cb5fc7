"""NormalFloat: quantiles of a normal distribution as levels, W^ = absmax * table[code].

    code     unsigned, `bits` bits: an index into the rising table, which holds -1, 0 and 1
    absmax   the largest magnitude of a group: fp16, or with `double` scale * (step + 1) / 256; fp32 with
             scale_type="float32", which imported codes may need
    step     unsigned, 8 bits, one a group; only with `double`
    scale    fp16, one a row; only with `double`

With 4 bits the table is NF4's, number by number. Those for 2 and 3 bits follow its construction and are
bitmill's: 2^(bits-1) quantiles of the standard normal distribution on the positive side, one less on the
negative, evenly spaced in probability between 1/2 and 1 - (1/2^(bits+1) + 1/(2^(bits+1) - 2)) / 2, divided by
the largest. Bits a weight: bits + 16/group_size, with `double` bits + 8/group_size + 16/columns.

Sources: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), section 3 and appendix E, for the table and the idea
of quantizing the absmax again. QLoRA codes the absmax of 256 groups, less their mean, in 8-bit floats; here the
groups of one row share a scale, so that rows stay independent, and the steps are even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import as_stored, positive
from bitmill.formats.part import SCALE_TYPES, Part, ScaleType
from bitmill.formats.scaled import Scaled
from bitmill.numerics.table import Table

_TABLES = {
    2: (-1.0, 0.0, 0.4358181645831157, 1.0),
    3: (
        *(-1.0, -0.5350227084855379, -0.24693143181157526, 0.0),
        *(0.18333748033548752, 0.3819939543209139, 0.6229857417143423, 1.0),
    ),
    4: (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}
_STEPS = 256


@FORMATS.register("normal_float")
@dataclass(frozen=True)
class NormalFloat(Scaled):
    """Quantiles of a normal distribution, scaled to the largest magnitude; `bits` 2 to 4."""

    double: bool = False
    scale_type: ScaleType = "float16"

    left_out: ClassVar[dict[str, Any]] = {"scale_type": "float16"}
    max_bits: ClassVar[int] = 4
    shares: ClassVar[tuple[float, ...]] = tuple(1 - k / 20 for k in range(1, 12))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in _TABLES:
            raise RecipeError(
                f"normal_float has tables for 2, 3 and 4 bits, not {self.bits!r}; choose one of them."
            )

    @property
    def groups_independent(self) -> bool:  # type: ignore[override]
        """False with `double`, where groups share the row's scale."""
        return not self.double

    def table(self, device: torch.device) -> Table:
        """Return the quantiles."""
        return Table(torch.tensor(_TABLES[self.bits], device=device))

    def factor(self, params: Params) -> Tensor:
        """Return absmax."""
        if not self.double:
            return params["absmax"]
        return params["scale"] * ((params["step"] + 1) / _STEPS)

    def start(self, x: Tensor) -> Params:
        """Return the largest magnitudes."""
        largest = x.abs().amax(-1)
        shared = {"scale": positive(as_stored(largest.amax(1, keepdim=True)))} if self.double else {}
        return {**shared, **self.with_factor(largest, shared)}

    def start_group(self, x: Tensor, params: Params) -> Params:
        """Return the group's largest magnitude."""
        return self.with_factor(x.abs().amax(-1), params)

    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Store the nearest absmax.

        Returns:
            "absmax" (rows, groups), or with `double` "step" (rows, groups).
        """
        if not self.double:
            return {"absmax": positive(as_stored(factor))}
        return {"step": (factor / params["scale"] * _STEPS - 1).round().clamp(0, _STEPS - 1)}

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return absmax, or step and row scale."""
        rows, groups = self.grid(shape)
        stored_as = SCALE_TYPES[self.scale_type]
        if not self.double:
            return (Part("absmax", (rows, groups), stored_as=stored_as),)
        return Part("scale", (rows, 1), stored_as=stored_as), Part("step", (rows, groups), 8)
