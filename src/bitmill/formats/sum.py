"""Sum: a dense matrix in any format, plus a few entries in fp16.

    W = inner + S,   S sparse, exactly round(outliers * size) + round(sensitive * size) entries

    sparse_values   fp16, the entries row by row
    sparse_columns  their columns, 16 bits each (32 where there are more than 65535 columns)
    sparse_counts   entries of every row, of that type

The entries are those to which the loss is most sensitive (`sensitive`), then the largest of the others
(`outliers`); without them the inner format covers a narrower range. Bits a weight: the inner format's, and for
n entries (32 n + 16 rows) / size: 0.14 + 16/columns at 0.45 %.

The inner matrix is solved for W with zeros at these places, where errors have no weight. It decodes to some
small level there, the one nearest to 0, so the stored value is W minus that level. With the Gram matrix of
the inputs the values are refitted in its metric instead: after error feedback, which has spread the
dense errors over the row, the entries then take over as much as they can of them.

Source: SqueezeLLM (Kim et al. 2023, arXiv 2306.07629), section 4.2. There outliers are found by a threshold on
the spread of the weights, tuned until the share is right; here they are counted.
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
from bitmill.numerics.sparse import best_values, from_index, index_type, largest, places, to_index
from bitmill.numerics.statistics import Statistics

_DAMP = 0.01  # of the refit: a row has few entries, and the Gram matrix many tokens


@FORMATS.register("sum")
@dataclass(frozen=True)
class Sum(Wrapper):
    """A dense inner format plus shares `outliers` and `sensitive` of all entries in fp16."""

    outliers: float = 0.004
    sensitive: float = 0.0005

    largest: ClassVar[float] = FP16_MAX

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.outliers >= 0 and self.sensitive >= 0 and 0 < self.outliers + self.sensitive <= 0.25):
            raise RecipeError(
                f"outliers is {self.outliers!r} and sensitive {self.sensitive!r}; use shares of 0 or more that "
                "add up to at most 0.25, or the inner format alone for none."
            )
        if {part.name for part in self.own_parts((1, 1))} & {part.name for part in self.inner.parts((1, 1))}:
            raise RecipeError("A sum is inside a sum; add their shares up in one.")

    def uncompiled_reason(self, columns: int) -> str | None:
        """Return a reason where inputs are rounded."""
        if self.quantizes_inputs:
            return "sparse entries multiply rounded inputs"
        return self.inner.uncompiled_reason(columns)

    def entries(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the number of entries kept for being sensitive, and of those kept for being large."""
        size = shape[0] * shape[1]
        return round(self.sensitive * size), round(self.outliers * size)

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return fp16 values, their columns, and the number of entries in each row."""
        count, index = sum(self.entries(shape)), index_type(shape[1])
        return (
            Part("sparse_values", (count,)),
            Part("sparse_columns", (count,), stored_as=index),
            Part("sparse_counts", (shape[0],), stored_as=index),
        )

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return the inner format's, or that entries are outside the matrix, out of order or stored twice."""
        counts, columns = from_index(tensors["sparse_counts"]), from_index(tensors["sparse_columns"])
        if int(counts.sum()) != len(columns) or bool((counts > shape[1]).any()):
            return "its sparse_counts do not add up"
        rows = torch.repeat_interleave(torch.arange(shape[0], device=counts.device), counts)
        at = rows * shape[1] + columns
        if bool((columns >= shape[1]).any()) or not bool((at[1:] > at[:-1]).all()):
            return "its sparse_columns are outside the matrix or out of order"
        return super().damage_reason(tensors, shape)

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Choose the entries and set them to zero in the dense matrix; fit them to its error afterwards.

        Returns:
            The dense matrix with statistics that exclude the entries.
        """
        mask = self._choose(W, stats)
        dense = W.masked_fill(mask, 0)
        return Reduction(dense, stats.exclude(mask), lambda solved: self._add_entries(W, stats, mask, solved))

    def _add_entries(self, W: Tensor, stats: Statistics, mask: Tensor, dense: Quantized) -> Quantized:
        """Fit the masked entries to the error that the dense matrix leaves."""
        error = W - dense.dequantize()
        values = error[mask] if stats.gram is None else best_values(error, stats.gram, mask, _DAMP)
        columns = W.shape[1]
        own = {
            "sparse_values": as_stored(values),
            "sparse_columns": to_index(mask.nonzero()[:, 1], columns),
            "sparse_counts": to_index(mask.sum(1), columns),
        }
        return replace(dense, format=self, params={**dense.params, **own})

    def inner_matrix(self, W: Tensor, params: Params) -> Tensor:
        """Set the entries to zero."""
        mask = torch.zeros_like(W, dtype=torch.bool)
        mask[places(params["sparse_counts"], params["sparse_columns"])] = True
        return W.masked_fill(mask, 0)

    def assemble(self, inner: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Add the entries."""
        W = inner.clone()
        W[places(params["sparse_counts"], params["sparse_columns"])] += params["sparse_values"]
        return W

    def _choose(self, W: Tensor, stats: Statistics) -> Tensor:
        """Return a mask of the most sensitive entries, by Fisher, Gram or magnitude, and of the largest others."""
        sensitive, outliers = self.entries((W.shape[0], W.shape[1]))
        size = W.abs()
        if stats.fisher is not None:
            score = stats.fisher
        else:
            score = size if stats.gram is None else size.square() * stats.gram.diagonal()
        mask = largest(score, sensitive)
        return mask | largest(size.masked_fill(mask, -1), outliers)
