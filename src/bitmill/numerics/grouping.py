"""Groups of input columns that share quantization parameters.

A matrix (rows, columns) is viewed as (rows, groups, width). Where the width does not divide the columns
(SmolLM2's 576 inputs in groups of 128), the last group is ragged: `grouped` pads it with zeros and `ungrouped`
cuts the padding off; the padding has no importance when parameters are fitted. Formats that code `block`
columns jointly pad the columns to whole blocks first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GroupSize = int | Literal["row", "tensor"]


def group_width(shape: tuple[int, int], size: GroupSize, block: int = 1) -> int:
    """Return the columns in one group of a matrix.

    Args:
        shape: (rows, columns).
        size: columns in a group, "row" or "tensor".
        block: columns coded jointly.
    """
    rows, columns = shape[0], -(-shape[1] // block) * block
    if size == "tensor":
        return rows * columns
    return columns if size == "row" else min(int(size), columns)


def group_grid(shape: tuple[int, int], size: GroupSize, block: int = 1) -> tuple[int, int]:
    """Return the shape of parameter arrays, (rows, groups); (1, 1) for one group over the whole tensor.

    Args:
        shape: (rows, columns).
        size: columns in a group, "row" or "tensor".
        block: columns coded jointly.
    """
    if size == "tensor":
        return 1, 1
    return shape[0], -(-shape[1] // group_width(shape, size, block))


def grouped(x: Tensor, size: GroupSize, block: int = 1) -> Tensor:
    """View a matrix in groups, padded with zeros.

    Args:
        x: (rows, columns).
        size: columns in a group, "row" or "tensor".
        block: columns coded jointly.

    Returns:
        (rows, groups, width); (1, 1, rows*columns) for size "tensor".
    """
    shape = (x.shape[0], x.shape[1])
    rows, groups = group_grid(shape, size, block)
    width = group_width(shape, size, block)
    missing = (groups * width if size != "tensor" else width // shape[0]) - shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(rows, groups, width)


def ungrouped(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Invert `grouped`: remove the padding.

    Args:
        x: (rows, groups, width).
        shape: (rows, columns) of the matrix.

    Returns:
        (rows, columns).
    """
    rows, columns = shape
    return x.reshape(rows, -1)[:, :columns]


def grouped_importance(
    importance: Tensor | None, shape: tuple[int, int], size: GroupSize, block: int = 1
) -> Tensor:
    """View importances in groups, zero on padding.

    Args:
        importance: of every column (columns,) or of every weight (rows, columns); None for equal importance.
        shape: (rows, columns).
        size: columns in a group, "row" or "tensor".
        block: columns coded jointly.

    Returns:
        fp32 (1|rows, groups, width).
    """
    if importance is None:
        importance = torch.ones(shape[1])
    importance = importance.to(torch.float32)
    if importance.dim() == 1:
        importance = importance[None, :]
        if size == "tensor":
            importance = importance.expand(shape)
    return grouped(importance, size, block)
