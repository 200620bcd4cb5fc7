"""Matrices of evenly spaced levels as codes, scales and zeros in whole groups of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.exports.base import Layer, Target
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform


@dataclass(frozen=True)
class Integers:
    """A matrix W = scale * (code - zero).

    Attributes:
        codes: uint8 (rows, columns).
        scale: fp16 (rows, groups).
        zero: int32 (rows, groups).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Grid:
    """The levels of a layer.

    Attributes:
        bits: of a code.
        symmetric: the zero is 2**(bits-1).
        group: columns of a group.
        columns: of the matrix.
    """

    bits: int
    symmetric: bool
    group: int
    columns: int

    @property
    def per_row(self) -> bool:
        """True with one group a row."""
        return self.group == self.columns


def grid(layer: Layer) -> Grid | str:
    """Return the grid of a layer, or why it has none, as the end of a sentence."""
    format = layer.format
    if isinstance(format, Uniform) and format.scale_type != "float16":
        return "its scales are in fp32, and the target holds those in fp16"
    if not isinstance(format, Uniform):
        return f"it is stored as {format.name}, and the target holds evenly spaced levels alone (rtn, gptq, awq)"
    if format.arithmetic is None:
        return "its zeros are fractions, and the target holds integers; quantize with zero=integer"
    rows, groups = format.grid(layer.shape)
    if rows != layer.shape[0]:
        return "all of its rows share a scale; quantize with a scale for each row or group"
    width = format.width(layer.shape)
    if width * groups != layer.shape[1]:
        return f"its {layer.shape[1]} columns are no whole groups of {width}; quantize with another group size"
    return Grid(format.bits, format.symmetric, width, layer.shape[1])


def integers(quantized: Quantized) -> Integers:
    """Return codes, scales and zeros of a matrix that has a grid."""
    format = quantized.format
    assert isinstance(format, Uniform)
    scale = quantized.params["scale"]
    zero = torch.full_like(scale, 1 << (format.bits - 1)) if format.symmetric else quantized.params["zero"]
    return Integers(quantized.codes, scale.to(torch.float16), zero.to(torch.int32))


def decode_integers(matrix: Integers) -> Tensor:
    """Return the matrix fp32 (rows, columns)."""
    rows, columns = matrix.codes.shape
    codes = matrix.codes.to(torch.float32).view(rows, matrix.scale.shape[1], -1)
    return ((codes - matrix.zero[..., None]) * matrix.scale.float()[..., None]).view(rows, columns)


class OneGridTarget(Target):
    """A target whose config describes one grid for all layers of a checkpoint."""

    def mixed_reason(self, layers: Mapping[str, Layer]) -> str | None:
        """Return that layers have several bit-widths or groups."""
        first, expected = next(iter(layers.items()))
        group = common_group(layers)
        for name, layer in layers.items():
            found, kind = known_grid(layer), known_grid(expected)
            if (found.bits, found.symmetric) != (kind.bits, kind.symmetric) or group not in (-1, found.group):
                return (
                    f"{name!r} has other bits or groups than {first!r}, and {self.name} holds one kind in a "
                    "checkpoint; use --to compressed-tensors"
                )
        return None


def common_group(layers: Mapping[str, Layer]) -> int:
    """Return the columns of a group of the layers that have several groups a row; -1 where none has.

    Args:
        layers: by name, each with a grid.
    """
    return next((found.group for found in map(known_grid, layers.values()) if not found.per_row), -1)


def known_grid(layer: Layer) -> Grid:
    """Return the grid of a layer that has one."""
    found = grid(layer)
    assert isinstance(found, Grid)
    return found
