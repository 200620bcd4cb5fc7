"""A quantized matrix as plain data: the format, the codes, the named parameters, the shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import Format, GroupFormat, Params
from bitmill.numerics.grouping import grouped, grouped_importance

_SLICE = 1 << 20  # weights
_TOKENS = 7  # of a call, as an example
SHARED = "shared_parts"  # the module of a quantized model that holds what layers share


def shared_module_path(kind: str) -> str:
    """Return the path of the module that holds the parts shared by the layers of a kind."""
    return f"{SHARED}.{kind}"


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix W^ (rows, columns) in `format`.

    codes: uint8 or int32 (rows, format.codes_in(columns)).  params: name -> fp32, as stored.
    """

    format: Format
    codes: Tensor
    params: Params
    shape: tuple[int, int]  # (rows, columns), that is (out, in) of the linear layer

    def dequantize(self) -> Tensor:
        """Return the stored numbers, fp32 (rows, columns)."""
        return self.format.dequantize(self.codes, self.params, self.shape)

    @property
    def rounding(self) -> Callable[[Tensor], Tensor] | None:
        """A function that rounds inputs as the matrix multiplies them; None where it takes them as they are."""
        if not self.format.quantizes_inputs:
            return None
        return replace(self, codes=self.codes.new_empty(0)).effective_inputs  # which keeps no codes

    def effective_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs (..., columns) that the matrix multiplies in place of x, see `Format`."""
        return self.format.effective_inputs(x, self.params)

    def pack(self) -> dict[str, Tensor]:
        """Return the tensors to write, as named by `format.layout(shape)`."""
        return self.format.pack(self.codes, self.params, self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk, everything included, over the number of weights."""
        return self.format.stored_bits(self.shape) / (self.shape[0] * self.shape[1])

    def split(self, sizes: list[int]) -> list[Quantized]:
        """Cut along the rows, for layers that were solved together; params shared by all rows are copied."""
        cuts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        pieces = []
        for start, stop in itertools.pairwise(cuts):
            params = {k: v if v.shape[0] == 1 else v[start:stop] for k, v in self.params.items()}
            pieces.append(Quantized(self.format, self.codes[start:stop], params, (stop - start, self.shape[1])))
        return pieces


def total_stored_bits(layers: Iterable[tuple[Format, tuple[int, int], Hashable]]) -> int:
    """Return the bits on disk of several layers, with shared parts counted once.

    Args:
        layers: format, shape (rows, columns), and a key that is equal for layers that share parts.
    """
    total, shared = 0, dict[Hashable, int]()
    for format, shape, key in layers:
        own = format.own_bits(shape)
        total += own
        shared[key] = format.stored_bits(shape) - own
    return total + sum(shared.values())


def row_slices(shape: tuple[int, int]) -> list[int]:
    """Return the number of rows of each slice in which the largest matrices of a model are decoded.

    Args:
        shape: (rows, columns).
    """
    rows, step = shape[0], max(1, _SLICE // shape[1])
    return [min(step, rows - start) for start in range(0, rows, step)]


def unpack(format: Format, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Quantized:
    """Invert `Quantized.pack`.

    Args:
        tensors: as named by `format.layout(shape)`.
        shape: (rows, columns).
    """
    codes, params = format.unpack(tensors, shape)
    return Quantized(format, codes, params, shape)


def fit_matrix(format: GroupFormat, W: Tensor, importance: Tensor | None, search: bool) -> Params:
    """Fit parameters to a matrix by `format.fit`.

    Args:
        W: (rows, columns).
        importance: (columns,) or (rows, columns); None for equal importance.
        search: as of `GroupFormat.fit`.
    """
    shape = (W.shape[0], W.shape[1])
    weight = grouped_importance(importance, shape, format.group_size, format.block).to(W.device)
    return format.fit(grouped(W, format.group_size, format.block), weight, search)


def fit_with_shared(format: GroupFormat, W: Tensor, importance: Tensor | None, params: Params) -> Params:
    """Fit parameters to a matrix by `format.fit_group`: the parts that rows share are given.

    Args:
        W: (rows, columns).
        importance: (columns,) or (rows, columns); None for equal importance.
        params: the shared parts.
    """
    shape = (W.shape[0], W.shape[1])
    weight = grouped_importance(importance, shape, format.group_size, format.block).to(W.device)
    return format.fit_group(grouped(W, format.group_size, format.block), weight, params)


def nearest_matrix(format: Format, W: Tensor, params: Params) -> Quantized:
    """Return the storable matrix closest to W under fixed params.

    Args:
        W: (rows, columns).
        params: of its groups.
    """
    return Quantized(format, format.nearest_codes(W, params), params, (W.shape[0], W.shape[1]))


def check_no_table(format: GroupFormat) -> None:
    """Raise RecipeError for a format whose tokens share a table, which would be fitted to each call."""
    parts = format.parts((_TOKENS, format.block))
    if any(part.shape[0] == 1 < prod(part.shape) for part in parts):
        raise RecipeError(
            f"Tokens stored as {format.name!r} share a table that would be fitted to each call; use a format "
            "with parameters of every token, such as uniform."
        )
