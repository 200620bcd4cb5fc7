"""Codebook: any 2**bits numbers, shared by a row.

    code   unsigned, `bits` bits, an index into the table
    table  fp16, 2**bits levels a group, sorted when fitted

Levels follow the density of the (weighted) weights: `fit` is k-means on a line. Bits a weight: bits +
16 * 2**bits / width of a group, so whole rows, the default, make 4 bits cost 4 + 256/columns.

Source: SqueezeLLM (Kim et al. 2023, arXiv 2306.07629), section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import as_stored
from bitmill.formats.part import Part
from bitmill.formats.scalar import ScalarFormat
from bitmill.numerics.grouping import GroupSize
from bitmill.numerics.kmeans import kmeans, kmeans_start


@FORMATS.register("codebook")
@dataclass(frozen=True)
class Codebook(ScalarFormat):
    """A table of 2**bits free levels per tensor, row or group; `bits` 1 to 8."""

    group_size: GroupSize = "row"

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Run weighted k-means; without `search` return its starting levels.

        Returns:
            "table" (rows, groups, 2**bits), sorted.
        """
        method = kmeans if search else kmeans_start
        table = method(x.flatten(0, 1), importance.expand(x.shape).flatten(0, 1), 1 << self.bits)
        return {"table": as_stored(table).unflatten(0, x.shape[:2])}

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Return the weighted mean of the numbers of each code; a code without weight keeps its level."""
        index, weight = codes.long(), importance.expand(x.shape).double()
        empty = weight.new_zeros(*x.shape[:-1], 1 << self.bits)
        mass = empty.scatter_add(-1, index, weight)
        mean = empty.scatter_add(-1, index, weight * x) / mass.clamp(min=1e-300)
        return {"table": torch.where(mass > 0, as_stored(mean.float()), params["table"])}

    def levels(self, params: Params) -> Tensor:
        """Return the table."""
        return params["table"]

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return fp16 levels."""
        return (Part("table", (*self.grid(shape), 1 << self.bits)),)
