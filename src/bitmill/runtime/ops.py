"""The compiled kernels as torch operators, so that tracing and compiling see them."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.runtime.native import native, threads

_SCHEMA = "(Tensor x, Tensor codes, Tensor?[] parts, int[] plan, float zero) -> Tensor"


def run_lut_linear(x: Tensor, codes: Tensor, parts: list[Tensor | None], plan: list[int], zero: float) -> Tensor:
    """x (tokens, in) fp32 to (tokens, out).

    codes, parts, plan, zero: the weights as `kernels.lut` lays them out; plan starts with (out, in).
    """
    library = native()
    y = torch.empty(x.shape[0], plan[0])
    layout = library.Layout(*plan[:6])
    source, wide, record_bytes, records, bank_bits, act = plan[6:]
    tables = (source, bool(wide), record_bytes, records, bank_bits, zero)
    library.linear(layout, *tables, codes, *parts, act, x.contiguous(), y, threads())
    return y


_NAME = "bitmill::lut_linear"
lut_linear = torch.library.custom_op(_NAME, run_lut_linear, mutates_args=(), device_types="cpu", schema=_SCHEMA)


@lut_linear.register_fake
def _(x: Tensor, codes: Tensor, parts: list[Tensor | None], plan: list[int], zero: float) -> Tensor:
    return x.new_empty(x.shape[0], plan[0])
