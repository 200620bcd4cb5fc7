"""Groups of input columns that share quantization parameters.

A matrix (rows, columns) is seen as (rows, groups, width). Where the width does not divide the columns
(SmolLM2's 576 inputs in groups of 128), the last group is ragged: it is padded with zeros here and cut off
again by `ungrouped`; whoever fits parameters gives the padding no importance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GroupSize = int | Literal["row", "tensor"]


def group_width(shape: tuple[int, int], size: GroupSize) -> int:
    """Columns in one group of a matrix of `shape` (rows, columns)."""
    rows, columns = shape
    if size == "tensor":
        return rows * columns
    return columns if size == "row" else min(int(size), columns)


def group_grid(shape: tuple[int, int], size: GroupSize) -> tuple[int, int]:
    """(rows, groups) of the parameter arrays; (1, 1) for one group over the whole tensor."""
    rows, columns = shape
    if size == "tensor":
        return 1, 1
    width = group_width(shape, size)
    return rows, (columns + width - 1) // width


def grouped(x: Tensor, size: GroupSize) -> Tensor:
    """(rows, columns) to (rows, groups, width), zero-padded; (1, 1, rows*columns) for size 'tensor'."""
    rows, groups = group_grid((x.shape[0], x.shape[1]), size)
    width = group_width((x.shape[0], x.shape[1]), size)
    if size == "tensor":
        return x.reshape(1, 1, width)
    missing = groups * width - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(rows, groups, width)


def ungrouped(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `grouped`: cut the padding and give back (rows, columns)."""
    rows, columns = shape
    return x.reshape(rows, -1)[:, :columns]


def grouped_importance(importance: Tensor | None, shape: tuple[int, int], size: GroupSize) -> Tensor:
    """Importance of every column as seen by the groups: (1, groups, width), zero on padding.

    importance: (columns,) or None for equal importance.
    """
    rows, columns = shape
    if importance is None:
        importance = torch.ones(columns)
    importance = importance.to(torch.float32)
    if size == "tensor":
        return importance.repeat(rows).reshape(1, 1, -1)
    return grouped(importance.reshape(1, columns), size)
