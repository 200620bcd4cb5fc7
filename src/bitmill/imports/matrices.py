"""Matrices in the formats that hold the numbers of other programs: evenly spaced levels, elements, quantiles.

Scales are stored in fp16 where that is exact, and in fp32 otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.affine import Affine
from bitmill.formats.float import Float
from bitmill.formats.normal_float import NormalFloat
from bitmill.formats.part import ScaleType
from bitmill.formats.permuted import Permuted
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.imports.base import checked
from bitmill.numerics.grouping import GroupSize
from bitmill.numerics.minifloat import ElementName


def scale_type(*scales: Tensor) -> ScaleType:
    """Return the type that holds scales exactly. Raises SourceError for NaN, infinities, or fp64."""
    for scale in scales:
        if not bool(torch.isfinite(scale).all()):
            raise SourceError("A scale is NaN or infinite; fetch the model again.")
    exact = all(torch.equal(scale.to(torch.float16).to(scale.dtype), scale) for scale in scales)
    return "float16" if exact else "float32"


def group_size(columns: int, groups: int, stated: int | None = None) -> GroupSize:
    """Return the group size of rows of so many groups; "row" for one, unless the checkpoint states it.

    Args:
        columns: of the matrix.
        groups: of a row.
        stated: columns of a group as the checkpoint states them, None where it does not.

    Raises:
        SourceError: the columns are no such groups.
    """
    if stated is None and groups == 1:
        return "row"
    width = stated if stated is not None else -(-columns // max(groups, 1))
    if width <= 0 or -(-columns // width) != groups:
        raise SourceError(f"{columns} columns are no {groups} groups of {width}; fetch the model again.")
    return width


def evenly_spaced(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None = None
) -> Quantized:
    """Return scale * (code - zero).

    Args:
        codes: uint8 (rows, columns).
        scale: (rows, groups), of any float type.
        zero: integers (rows, groups); None where it is 2**(bits-1).
        bits: of a code, 1 to 8.
        group: columns of a group where the checkpoint states them.

    Raises:
        SourceError: the shapes do not fit each other, or a zero is beyond the codes.
    """
    shape, middle = (codes.shape[0], codes.shape[1]), 1 << (bits - 1)
    size = group_size(shape[1], scale.shape[1], group)
    if zero is not None and bool((zero == middle).all()):
        zero = None
    if zero is not None and (int(zero.min()) < 0 or int(zero.max()) >= 1 << bits):
        raise SourceError(f"A zero is {int(zero.max())}, which codes of {bits} bits do not reach; quantize again.")
    format = Uniform(bits, size, symmetric=zero is None, scale_type=scale_type(scale))
    params = {"scale": scale.float()} | ({} if zero is None else {"zero": zero.float()})
    return Quantized(format, codes, params, shape)


def with_offset(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int | None = None) -> Quantized:
    """Return scale * code + offset.

    Args:
        codes: uint8 (rows, columns).
        scale, offset: (rows, groups).
        bits: of a code, 1 to 8.
        group: columns of a group where the checkpoint states them.
    """
    shape = codes.shape[0], codes.shape[1]
    format = Affine(bits, group_size(shape[1], scale.shape[1], group), scale_type(scale, offset))
    return Quantized(format, codes, {"scale": scale.float(), "offset": offset.float()}, shape)


def elements(codes: Tensor, scale: Tensor, element: ElementName, bits: int, group: int | None = None) -> Quantized:
    """Return scale * element(code).

    Args:
        codes: uint8 (rows, columns).
        scale: (rows, groups).
        element: the type of the codes.
        bits: of a code.
        group: columns of a group where the checkpoint states them.
    """
    shape = codes.shape[0], codes.shape[1]
    format = Float(bits, group_size(shape[1], scale.shape[1], group), element, scale_type(scale))
    return Quantized(format, codes, {"scale": scale.float()}, shape)


def quantiles(codes: Tensor, absmax: Tensor, bits: int, group: int) -> Quantized:
    """Return absmax * quantile[code].

    Args:
        codes: uint8 (rows, columns).
        absmax: (rows, groups).
        bits: of a code.
        group: columns of a group.
    """
    shape = codes.shape[0], codes.shape[1]
    format = NormalFloat(bits, group, double=False, scale_type=scale_type(absmax))
    return Quantized(format, codes, {"absmax": absmax.float()}, shape)


def ordered(quantized: Quantized, order: Tensor) -> Quantized:
    """Return a matrix whose columns are stored in another order.

    Args:
        quantized: the columns as they are stored.
        order: int64 (columns,), the column at each place.
    """
    format = Permuted(quantized.format)
    part = format.own_parts(quantized.shape)[0]
    stored = order.to(torch.float32 if part.bits else torch.int32)
    return replace(quantized, format=format, params={**quantized.params, "order": stored})


def group_order(
    layer: str, part: str, index: Tensor, size: tuple[int, int], group: int | None = None
) -> Tensor | None:
    """Return the columns sorted by group, int64; None where they are in order, or have one group.

    Args:
        layer, part: of the index, for messages.
        index: (columns,), the group of each column.
        size: columns of the matrix and groups of a row.
        group: columns of a group where the checkpoint states them.

    Raises:
        SourceError: the index is of other columns, or the groups have other sizes.
    """
    columns, groups = size
    width = group or -(-columns // groups)
    expected = torch.arange(columns) // width
    index = checked(layer, part, index, (columns,)).long()
    if groups == 1 or torch.equal(index, expected):
        return None
    order = index.argsort(stable=True)
    if torch.equal(index[order], expected):
        return order
    raise SourceError(f"{part} of {layer!r} names groups that do not have {width} columns each; quantize again.")


def in_order(
    order: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None = None
) -> Quantized:
    """Return scale * (code - zero), with columns stored sorted by group; see `group_order` and `evenly_spaced`."""
    if order is None:
        return evenly_spaced(codes, scale, zero, bits, group)
    return ordered(evenly_spaced(codes[:, order].contiguous(), scale, zero, bits, group), order)


def nibbles(packed: Tensor) -> Tensor:
    """Return the codes of 4 bits in bytes, the low half first: uint8 (rows, 2 * bytes)."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
