"""Soft rounding of a matrix: a smooth function that tends to `Format.fake_quantize` as its temperature falls."""

from __future__ import annotations

from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import Format, Params
from bitmill.formats.scalar import ScalarFormat
from bitmill.formats.wrapper import Wrapper
from bitmill.numerics.grouping import grouped, ungrouped
from bitmill.numerics.soft_rounding import soft_rounding


def has_soft_rounding(format: Format) -> bool:
    """Return True for formats whose every weight has levels of its own, and for wrappers of them."""
    return isinstance(format.core, ScalarFormat)


def soft_quantize(format: Format, W: Tensor, params: Params, temperature: float) -> Tensor:
    """Move every weight towards the nearer of the levels around it, with exact gradients.

    Args:
        format: of the matrix.
        W: fp32 (rows, columns).
        params: fp32 working values by name, as stored.
        temperature: above 0, in gaps between levels, see `numerics.soft_rounding`.

    Raises:
        RecipeError: the format has no levels of single weights.
    """
    shape = (W.shape[0], W.shape[1])
    if isinstance(format, Wrapper):
        inner, known = format.inner_matrix(W, params), format.inner_params(params, shape)
        return format.assemble(soft_quantize(format.inner, inner, known, temperature), params, shape)
    if not isinstance(format, ScalarFormat):
        raise RecipeError(f"The format {format.name!r} has no soft rounding; use a format of single weights.")
    x = grouped(W, format.group_size, format.block)
    return ungrouped(soft_rounding(x, format.levels(params), temperature), shape)
