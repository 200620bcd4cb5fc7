"""Rounded inputs of many tokens on a GPU: their codes times codes of the matrix (runtime.triton.codes)."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.formats.quantized import Quantized
from bitmill.formats.scalar import RangeFormat
from bitmill.runtime.kernels.triton import Triton


def multiply_on_gpu(inputs: Quantized, matrix: Triton) -> Tensor | None:
    """Multiply rounded inputs with a matrix, both as they are stored.

    Args:
        inputs: The inputs (tokens, in).
        matrix: The kernel of the matrix (out, in).

    Returns:
        fp32 (tokens, out); None where codes are no numbers of 8 bits, or scales of both do not fit.
    """
    format, columns = matrix.spec.format, matrix.spec.shape[1]
    assert isinstance(format, GroupFormat)
    codes, params = matrix.codes_and_params()
    widths = (
        min(inputs.format.core.width(inputs.shape), columns),
        min(format.width(matrix.spec.shape), columns),
    )
    step = min(widths)
    if max(widths) % step and max(widths) < columns:
        return None
    x, zeros = _numbers(inputs.format.core, inputs.codes, inputs.params)
    w, offsets = _numbers(format, codes, params)
    if x is None or w is None or x.dtype != w.dtype:
        return None
    if offsets is not None:
        w = _without(w, offsets, widths[1])
    if w is None:
        return None
    from bitmill.runtime.triton.codes import multiply_codes

    of_step = torch.arange(0, columns, step, device=w.device)
    scales, sizes = inputs.params["scale"], params["scale"]
    zeros = None if zeros is None else zeros.expand(len(x), -1)[:, of_step // widths[0]]
    return multiply_codes(
        x,
        scales.expand(len(x), -1)[:, of_step // widths[0]],
        w,
        sizes.expand(len(w), -1)[:, of_step // widths[1]],
        step,
        zeros,
    )


def _numbers(format: GroupFormat, codes: Tensor, params: Params) -> tuple[Tensor | None, Tensor | None]:
    """Return codes as int8 around the middle, and their codes of 0 if these are not 0; or as floats of 8 bits."""
    if getattr(format, "element", None) == "e4m3" and format.arithmetic == "float":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn), None
    if format.arithmetic != "integer" or not isinstance(format, RangeFormat):
        return None, None
    numbers, _, zero = format.integers(codes, params)
    return numbers, zero


def _without(codes: Tensor, zeros: Tensor, width: int) -> Tensor | None:
    """Return codes (rows, columns) less those of 0 (rows|1, groups|1); None where the differences are no bytes."""
    groups = torch.arange(codes.shape[1], device=codes.device) // width
    found = codes.to(torch.int16) - zeros.to(torch.int16).expand(len(codes), -1)[:, groups]
    return found.to(torch.int8) if int(found.abs().max()) <= 127 else None
