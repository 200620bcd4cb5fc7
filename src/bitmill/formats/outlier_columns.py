"""Outlier columns: another format for most columns, and fp16 for those with the largest inputs.

    y = x[base] W^^T + x[outliers] V^T

    outlier_columns  which they are, ascending, 16 bits each (32 where there are more than 65535 columns)
    outlier_values   fp16 V (rows, count)

A few input channels are many times larger than the rest. Kept in float, they neither widen the range of a token's
inputs nor of a row's weights. The outliers have the largest inputs of all calibration tokens.

The errors of the other columns flow into V, as they do in GPTQ where the outliers come last: with the Gram matrix
of the inputs in the blocks of base b and outliers o

    G_b - G_bo G_o^-1 G_ob     is the Gram matrix of the base, once V compensates for its errors
    V = W_o + (W_b - W^) G_bo G_o^-1

Inputs of the base may be quantized, those of the outliers stay in float. Bits a weight: those of the inner format
for the base, and count (16 + 16/rows) / columns.

Source: QUIK (Ashkboos et al. 2023, arXiv 2310.09259), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import FP16_MAX, as_stored
from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized
from bitmill.formats.wrapper import Reduction, Wrapper
from bitmill.numerics.sparse import from_index, index_type, to_index
from bitmill.numerics.statistics import Statistics

_DAMP = 0.01  # share of the mean diagonal


@FORMATS.register("outlier_columns")
@dataclass(frozen=True)
class OutlierColumns(Wrapper):
    """The inner format without the `columns` of largest inputs, which stay in fp16."""

    columns: int = 64

    largest: ClassVar[float] = FP16_MAX

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns < 1:
            raise RecipeError(f"columns is {self.columns!r}; use 1 or more, or the inner format alone for none.")

    @property
    def needs(self) -> frozenset[str]:
        """The largest inputs and the Gram matrix."""
        return self.inner.needs | frozenset({"gram", "activations"})

    def count(self, columns: int) -> int:
        """Return the number of outliers among a row of `columns`: at most half."""
        return min(self.columns, columns // 2)

    def inner_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the base."""
        return shape[0], shape[1] - self.count(shape[1])

    def uncompiled_reason(self, columns: int) -> str | None:
        """Return the inner format's for the base."""
        return self.inner.uncompiled_reason(columns - self.count(columns))

    def codes_in(self, columns: int) -> int:
        """Return the inner format's codes for the base."""
        return self.inner.codes_in(columns - self.count(columns))

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return which columns are outliers, and their fp16 weights."""
        count = self.count(shape[1])
        columns = Part("outlier_columns", (count,), stored_as=index_type(shape[1]))
        return columns, Part("outlier_values", (shape[0], count))

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return the inner format's, or that columns are outside the matrix or out of order."""
        found = from_index(tensors["outlier_columns"])
        if bool((found >= shape[1]).any()) or not bool((found[1:] > found[:-1]).all()):
            return "its outlier_columns are outside the matrix or out of order"
        return super().damage_reason(tensors, shape)

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Reduce to the base, whose errors the outliers compensate for.

        Raises:
            NumericsError: when calibration collected no Gram matrix.
        """
        gram = stats.required_gram(self.name)
        largest = (
            gram.diagonal() if stats.max_abs is None else stats.max_abs
        )  # a basis may know mean squares alone
        outliers = largest.topk(self.count(W.shape[1])).indices.sort().values
        base = base_columns(outliers, W.shape[1])
        G_o = gram[outliers][:, outliers].double()
        G_o.diagonal().add_(_DAMP * G_o.diagonal().mean() + 1e-30)
        flow = torch.linalg.solve(G_o, gram[outliers][:, base].double()).T  # G_bo G_o^-1
        left = gram[base][:, base].double() - flow @ gram[outliers][:, base].double()
        reduced = replace(stats.permute(base), gram=((left + left.T) / 2).float())

        def finish(solved: Quantized) -> Quantized:
            error = W[:, base] - solved.dequantize()
            own = {
                "outlier_columns": to_index(outliers, W.shape[1]),
                "outlier_values": as_stored(W[:, outliers] + error @ flow.float()),
            }
            return replace(solved, format=self, params={**solved.params, **own}, shape=(W.shape[0], W.shape[1]))

        return Reduction(W[:, base].contiguous(), reduced, finish)

    def inner_matrix(self, W: Tensor, params: Params) -> Tensor:
        """Return the base."""
        return W[:, base_columns(from_index(params["outlier_columns"]), W.shape[1])]

    def assemble(self, inner: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Put base and outliers into their places."""
        outliers = from_index(params["outlier_columns"])
        W = torch.empty(shape, device=inner.device)
        W[:, base_columns(outliers, shape[1])] = inner
        W[:, outliers] = params["outlier_values"]
        return W

    def effective_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return the base's inputs as the inner format rounds them, and the outliers' as they are."""
        if not self.quantizes_inputs:
            return x
        base = base_columns(from_index(params["outlier_columns"]), x.shape[-1])
        rounded = x.clone()
        rounded[..., base] = self.inner.effective_inputs(x[..., base], params)
        return rounded


def base_columns(outliers: Tensor, columns: int) -> Tensor:
    """Return the other columns, ascending.

    Args:
        outliers: int64 (count,).
        columns: of the matrix.
    """
    kept = torch.ones(columns, dtype=torch.bool, device=outliers.device)
    kept[outliers] = False
    return kept.nonzero()[:, 0]
