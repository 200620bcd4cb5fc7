"""Products of inputs that are int8 codes already, with packed weights: the runtime of W8A8 and W4A8 layers.

    x_tc = scale_ts * (code_tc - zero_ts)        s the step of column c
    y_tr = sum over s of scale_ts * (sum over c in s of code_tc * W^_rc - zero_ts * sum over c in s of W^_rc)

Tables of the weight are bytes (`kernels.lut`): exact for uniform grids, integer codings and e2m1, and otherwise
rounded to 1/254 of a table's largest magnitude. csrc/fixed/fixed.h states the sums to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.errors import UsageError
from bitmill.runtime.kernels.lut import Lut


def int8_linear(
    codes: Tensor, scales: Tensor, weights: Lut, zeros: Tensor | None = None, step_columns: int | None = None
) -> Tensor:
    """Multiply codes with a packed matrix.

    Args:
        codes: int8 (tokens, in), from -128 to 127.
        scales: fp32 (tokens|1, steps).
        weights: The matrix, of any scalar format of up to 8 bits.
        zeros: fp32 (tokens|1, steps), codes of the number 0; None for 0. Every step then costs as much as a token.
        step_columns: Columns that share a scale and a zero: a number of whole groups of the weight, or a part of
            one that 16 divides; None for one step per token.

    Returns:
        fp32 (tokens, out).

    Raises:
        UsageError: if steps are no groups of the weight, or a tensor has another shape or type.
    """
    columns = weights.spec.shape[1]
    step = columns if step_columns is None else step_columns
    steps = -(-columns // step) if step > 0 else 0
    shapes = [(name, each) for name, each in (("scales", scales), ("zeros", zeros)) if each is not None]
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != columns or not steps:
        raise UsageError(f"codes are {codes.dtype} {tuple(codes.shape)}; they must be int8 (tokens, {columns}).")
    for name, each in shapes:
        if each.dtype != torch.float32 or each.shape not in ((len(codes), steps), (1, steps)):
            raise UsageError(
                f"{name} are {each.dtype} {tuple(each.shape)}; they must be float32 ({len(codes)}, {steps})."
            )
    scales = scales.expand(len(codes), steps)
    try:
        if zeros is None:
            return weights.multiply_codes(codes, scales, step)
        # Rows of W^ are summed by tokens of ones, one for each step.
        ones = (torch.arange(columns) // step == torch.arange(steps)[:, None]).to(torch.int8)
        together = weights.multiply_codes(torch.cat([codes, ones]), torch.cat([scales, torch.eye(steps)]), step)
    except ValueError as error:
        raise UsageError(
            f"Steps of {step} columns do not fit the groups of {weights.spec.format!r}: {error}."
        ) from None
    products, sums = together[: len(codes)], together[len(codes) :]
    return products - (scales * zeros) @ sums
