"""Matrices of 8-bit floats with a scale for the tensor, a row, or a block of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.quantized import Quantized
from bitmill.imports.matrices import elements
from bitmill.numerics.minifloat import ELEMENTS, ElementName

_ELEMENTS: dict[torch.dtype, ElementName] = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def fp8(layer: str, weight: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Quantized:
    """Return weight * scale.

    Args:
        layer: for messages.
        weight: float8 (rows, columns).
        scale: one number, (rows, 1), (rows, groups), or (blocks of rows, blocks of columns).
        block: rows and columns of a block.

    Raises:
        SourceError: another type, NaN, or a shape that does not fit.
    """
    element = _ELEMENTS.get(weight.dtype)
    if element is None:
        raise SourceError(f"The weight of {layer!r} is {weight.dtype}; float8_e4m3fn and float8_e5m2 are read.")
    codes = weight.view(torch.uint8)
    if bool((weight.float().abs() > ELEMENTS[element].largest).any()) or bool(weight.isnan().any()):
        raise SourceError(f"The weight of {layer!r} holds NaN or infinities; fetch the model again.")
    rows = codes.shape[0]
    group = None
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    elif scale.dim() == 1:
        scale = scale[:, None]
    if scale.shape[0] != rows and block:
        height, group = int(block[0]), int(block[1])
        if height < 1 or scale.shape[0] != -(-rows // height):
            raise SourceError(f"The scale of {layer!r} has {scale.shape[0]} blocks of {height} rows, for {rows}.")
        scale = scale.repeat_interleave(height, 0)[:rows]
    if scale.dim() != 2 or scale.shape[0] != rows:
        raise SourceError(f"The scale of {layer!r} has the shape {tuple(scale.shape)}, for {rows} rows.")
    return elements(codes, scale.contiguous(), element, 8, group)
