"""Rows and columns of a quantized matrix, for the ranks of a tensor-parallel model."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.formats.quantized import Quantized, unpack
from bitmill.numerics.grouping import group_width


def shard(
    format: Format, tensors: dict[str, Tensor], shape: tuple[int, int], rows: slice, columns: slice
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Return the packed tensors of some rows and columns, with their shape.

    Args:
        format: of the matrix.
        tensors: its packed tensors.
        shape: (rows, columns) of the matrix.
        rows, columns: with a start and a stop.

    Raises:
        CheckpointError: the format has no part of that kind that decodes to the numbers of the whole.
    """
    whole = unpack(format, tensors, shape)
    part = _columns(_rows(whole, rows), columns)
    expected = whole.dequantize()[rows, columns]
    if part is None or not torch.equal(part.dequantize(), expected):
        raise CheckpointError(
            f"A matrix {shape} in the format {format.name!r} cannot be divided into rows {rows.start} to "
            f"{rows.stop} and columns {columns.start} to {columns.stop}; serve it with another tensor-parallel "
            "size, or with groups whose size divides the columns of each rank."
        )
    return part.pack(), part.shape


def _rows(whole: Quantized, rows: slice) -> Quantized:
    sizes = [rows.start, rows.stop - rows.start, whole.shape[0] - rows.stop]
    return whole if sizes[0] == sizes[2] == 0 else whole.split(sizes)[1]


def _columns(whole: Quantized, columns: slice) -> Quantized | None:
    """Return some columns; None where they are not whole groups of codes."""
    rows, width = whole.shape
    if (columns.start, columns.stop) == (0, width):
        return whole
    core = whole.format.core
    has_groups = isinstance(core.group_size, int)
    group = group_width(whole.shape, core.group_size) if has_groups else width
    block = group if has_groups else core.block
    codes = whole.format.codes_in(width)
    if core is not whole.format or columns.start % block or columns.stop % block or width % block:
        return None
    cut = slice(columns.start * codes // width, columns.stop * codes // width)
    groups = slice(columns.start // group, columns.stop // group)
    parts = {part.name: part.shape for part in whole.format.parts(whole.shape)}
    by_group = {n for n, shape in parts.items() if len(shape) > 1 and shape[1] == width // group > 1}
    params = {name: p[:, groups] if name in by_group else p for name, p in whole.params.items()}
    return Quantized(whole.format, whole.codes[:, cut], params, (rows, columns.stop - columns.start))
