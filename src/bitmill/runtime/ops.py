"""The compiled kernels as torch operators, so that tracing and compiling see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitmill.runtime.native import native, threads


class Operator:
    """A function of x (tokens, in), fp32, and of what stays the same, to (tokens, out).

    Outside of a trace it is called as it is: an operator's dispatch, some 40 us, would be most of a small layer's
    time.
    """

    def __init__(
        self, schema: str, run: Callable[..., Tensor], width: Callable[..., int], device: str | None = "cpu"
    ) -> None:
        """schema: of the arguments after x.  width: the outputs of a token, from the same arguments.

        device: the type of device it runs on; None for every.
        """
        self.run = run
        name = f"bitmill::{run.__name__[1:]}"
        self.op = torch.library.custom_op(
            name, run, mutates_args=(), device_types=device, schema=f"(Tensor x, {schema}) -> Tensor"
        )
        self.op.register_fake(lambda x, *rest: x.new_empty(x.shape[0], width(x, *rest)))

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """The outputs, by the operator where something looks on."""
        plain = type(x) is Tensor and not torch.compiler.is_compiling()
        return self.run(x, *rest) if plain else self.op(x, *rest)


def _lut_linear(x: Tensor, codes: Tensor, parts: list[Tensor | None], plan: list[int], zero: float) -> Tensor:
    """codes, parts, plan, zero: the weights as `kernels.lut` lays them out; plan starts with (out, in)."""
    library = native()
    y = torch.empty(x.shape[0], plan[0])
    source, wide, mirrored, record_bytes, records, bank_bits, act = plan[6:]
    tables = (source, bool(wide), bool(mirrored), record_bytes, records, bank_bits, zero)
    library.linear(library.Layout(*plan[:6]), *tables, codes, *parts, act, x.contiguous(), y, threads())
    return y


def _additive(x: Tensor, codes: Tensor, books: Tensor, scales: Tensor, layout: list[int]) -> Tensor:
    """codes, books, scales, layout: as `kernels.additive` lays them out; layout starts with `out`."""
    y = torch.empty(x.shape[0], layout[0])
    native().additive(native().Layout(*layout), codes, books, scales, x.contiguous(), y, threads())
    return y


def _vector_linear(x: Tensor, parts: list[Tensor], plan: list[int]) -> Tensor:
    """parts, plan: as `kernels.vector` has them; the first part is the packed codes, a line a row."""
    y = torch.empty(x.shape[0], parts[0].shape[0])
    native().vector_linear(*plan, *parts, x.contiguous(), y, threads())
    return y


def _points_linear(x: Tensor, codes: Tensor, parts: list[Tensor], plan: list[int]) -> Tensor:
    """codes, parts, plan: as `kernels.points` has them; plan starts with `out`."""
    y = torch.empty(x.shape[0], plan[0])
    native().points_linear(native().Layout(*plan[:6]), codes, *parts, plan[6], x.contiguous(), y, threads())
    return y


def _rotate(x: Tensor, steps: Tensor, numbers: Tensor, orders: Tensor) -> Tensor:
    """steps, numbers, orders: a chain of turns, see `runtime.rotation_plan`."""
    y = x.clone(memory_format=torch.contiguous_format)
    native().rotate(steps, numbers, orders, y, threads())
    return y


def _sparse_add(x: Tensor, y: Tensor, starts: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """y (tokens, out) plus the product with few entries: where each row starts, their columns, their values."""
    out = y.clone(memory_format=torch.contiguous_format)
    native().sparse_add(starts, places, values, x.contiguous(), out, threads())
    return out


lut_linear = Operator(
    "Tensor codes, Tensor?[] parts, int[] plan, float zero",
    _lut_linear,
    lambda x, codes, parts, plan, zero: plan[0],
)
additive = Operator(
    "Tensor codes, Tensor books, Tensor scales, int[] layout",
    _additive,
    lambda x, codes, books, scales, layout: layout[0],
)
vector_linear = Operator("Tensor[] parts, int[] plan", _vector_linear, lambda x, parts, plan: parts[0].shape[0])
points_linear = Operator(
    "Tensor codes, Tensor[] parts, int[] plan", _points_linear, lambda x, codes, parts, plan: plan[0]
)
rotate = Operator("Tensor steps, Tensor numbers, Tensor orders", _rotate, lambda x, *rest: x.shape[1])
sparse_add = Operator(
    "Tensor y, Tensor starts, Tensor places, Tensor values", _sparse_add, lambda x, y, *rest: y.shape[1]
)
