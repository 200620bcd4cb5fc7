"""Find weights whose magnitudes a format cannot store: scales and tables in fp16 saturate, or become 0.

A matrix and the same matrix times a power of two are rounded to nearest. Where scales have the range for both, the
relative errors are equal but for fp16's rounding; otherwise the matrix itself has lost something. No format has to
state its range, and matrices of usual magnitudes need no comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitmill.formats.base import Format, GroupFormat
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.wrapper import Wrapper

_USUAL = (2.0**-7, 2.0**13)  # largest magnitudes that every format stores: 8-bit scales then have 2^-15 or more
_RATIO, _SLACK = 1.1, 1e-3  # of the errors


@torch.no_grad()
def range_reason(format: Format, W: Tensor) -> str | None:
    """Return why a format cannot store the magnitudes of a matrix, as the end of a sentence, or None.

    Rows of zeros, and rows far below the largest of the matrix, are no reason.

    Args:
        format: The format; of a wrapper the core counts, and what it stores unscaled.
        W: fp32 (rows, columns).
    """
    largest = float(W.abs().amax()) if W.numel() else 0.0
    if largest == 0 or _USUAL[0] <= largest <= _USUAL[1]:
        return None
    while isinstance(format, Wrapper):
        if largest > format.largest:
            return f"are up to {largest:.3g}, and {format.name} stores numbers up to {format.largest:g}"
        format = format.inner
    assert isinstance(format, GroupFormat)
    usual = (W.double() * 2.0 ** -math.frexp(largest)[1]).float()
    for own, other in zip(_errors(format, W), _errors(format, usual)):
        if not own <= _RATIO * other + _SLACK:  # also where it is NaN
            side = "above" if largest > 1 else "below"
            return f"are up to {largest:.3g}, {side} the range of the scales of {format.name}"
    return None


def _errors(format: GroupFormat, W: Tensor) -> tuple[float, float]:
    """Return the relative errors of the matrix rounded to nearest: of all entries, and the largest."""
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, search=False)).dequantize().double()
    exact = W.double()
    error = decoded.sub_(exact)
    return float(error.norm() / exact.norm()), float(error.abs().amax() / exact.abs().amax())
