"""The compiled kernels as torch operators, so that tracing and compiling see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.runtime.native import native, threads


def is_traced(x: Tensor | None = None) -> bool:
    """Whether a trace, a transform or a mode looks on at what is done (with x)."""
    return (
        torch.compiler.is_compiling()
        or (x is not None and type(x) is not Tensor)
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


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
        self.op.register_vmap(self._batched)

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """The outputs, by the operator where something looks on."""
        return self.op(x, *rest) if is_traced(x) else self.run(x, *rest)

    def _batched(self, info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Tensor, int]:
        """One after the other, for torch.vmap."""
        each = [
            self.op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(given, in_dims)))
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return FORMATS.from_dict(json.loads(text))


@lru_cache(maxsize=256)
def text_of(format: Format) -> str:
    """A format as an argument of the operators below."""
    return json.dumps(format.to_dict())


# -- rows of W^ (n, in), fp32, in fresh memory: what traces decode by ------------------------------------------


def _fake_rows(of: Tensor, ids: Tensor, columns: int) -> Tensor:
    return of.new_empty(ids.shape[0], columns, dtype=torch.float32)


@torch.library.custom_op("bitmill::packed_rows", mutates_args=())
def packed_rows(ids: Tensor, tensors: list[Tensor], format: str, shape: list[int]) -> Tensor:
    """tensors: packed, in the order of `layout`."""
    made, size = _format(format), (shape[0], shape[1])
    named = dict(zip(made.layout(size), tensors))
    if isinstance(made, GroupFormat):
        return made.dequantize_rows(named, size, ids).clone()
    return made.dequantize(*made.unpack(named, size), size)[ids]


@packed_rows.register_fake
def _(ids: Tensor, tensors: list[Tensor], format: str, shape: list[int]) -> Tensor:
    return _fake_rows(tensors[0], ids, shape[1])


@torch.library.custom_op("bitmill::repacked_rows", mutates_args=(), device_types="cpu")
def repacked_rows(
    ids: Tensor, codes: Tensor, packed: list[Tensor], layout: list[int], format: str, shape: list[int]
) -> Tensor:
    """codes: in the layout of csrc/lut/layout.h.  packed: the rest, in the order of the format's."""
    made, size = _format(format), (shape[0], shape[1])
    assert isinstance(made, GroupFormat)
    found = torch.empty(len(ids), layout[1], dtype=torch.uint8)
    native().codes_at(native().Layout(*layout), codes, ids.contiguous(), found, threads())
    names = [name for name in made.layout(size) if name != "codes"]
    return made.rows_of(found, dict(zip(names, packed)), size, ids).clone()


@repacked_rows.register_fake
def _(
    ids: Tensor, codes: Tensor, packed: list[Tensor], layout: list[int], format: str, shape: list[int]
) -> Tensor:
    return _fake_rows(codes, ids, shape[1])


def _decoded(ids: Tensor, rows: int, columns: int, decode: Callable[[int, Tensor], None]) -> Tensor:
    """decode(first, out) fills out (n, columns) with rows from `first` on, of a matrix of `rows`."""
    which, out = ids.tolist(), torch.empty(len(ids), columns)
    if which and not 0 <= min(which) <= max(which) < rows:
        raise IndexError(f"rows {min(which)} to {max(which)} of a matrix that has {rows}")
    if which and which == list(range(which[0], which[0] + len(which))):
        decode(which[0], out)
        return out
    for i, row in enumerate(which):
        decode(row, out[i : i + 1])
    return out


@torch.library.custom_op("bitmill::points_rows", mutates_args=(), device_types="cpu")
def points_rows(ids: Tensor, codes: Tensor, parts: list[Tensor], plan: list[int], columns: int) -> Tensor:
    """codes, parts, plan: as `kernels.points` has them."""
    library, layout = native(), native().Layout(*plan[:6])

    def decode(first: int, out: Tensor) -> None:
        library.points_decode(layout, codes, *parts, first, out, threads())

    return _decoded(ids, plan[0], columns, decode)


@points_rows.register_fake
def _(ids: Tensor, codes: Tensor, parts: list[Tensor], plan: list[int], columns: int) -> Tensor:
    return _fake_rows(codes, ids, columns)


@torch.library.custom_op("bitmill::lattice_rows", mutates_args=(), device_types="cpu")
def lattice_rows(ids: Tensor, parts: list[Tensor], plan: list[int], columns: int) -> Tensor:
    """parts, plan: as `kernels.lattice` has them."""
    library, layout = native(), native().Layout(*plan[:6])

    def decode(first: int, out: Tensor) -> None:
        library.lattice_decode(layout, *parts, first, out, threads())

    return _decoded(ids, plan[0], columns, decode)


@lattice_rows.register_fake
def _(ids: Tensor, parts: list[Tensor], plan: list[int], columns: int) -> Tensor:
    return _fake_rows(parts[0], ids, columns)


# -- products --------------------------------------------------------------------------------------------------


def _lut_linear(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """codes, six parts, plan, zero: the weights as `kernels.lut` lays them out; plan starts with (out, in)."""
    *parts, plan, zero = rest
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


def _lattice_linear(x: Tensor, parts: list[Tensor], plan: list[int]) -> Tensor:
    """parts, plan: as `kernels.lattice` has them; plan starts with `out`."""
    y = torch.empty(x.shape[0], plan[0])
    native().lattice_linear(native().Layout(*plan[:6]), *parts, plan[6], x.contiguous(), y, threads())
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
    "Tensor codes, Tensor? tables, Tensor? ids, Tensor? powers, Tensor? scales, Tensor? zeros, "
    "Tensor? row_scales, int[] plan, float zero",  # no list of optional tensors: torch.jit.trace has none
    _lut_linear,
    lambda x, *rest: rest[-2][0],
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
lattice_linear = Operator("Tensor[] parts, int[] plan", _lattice_linear, lambda x, parts, plan: plan[0])
rotate = Operator("Tensor steps, Tensor numbers, Tensor orders", _rotate, lambda x, *rest: x.shape[1])
sparse_add = Operator(
    "Tensor y, Tensor starts, Tensor places, Tensor values", _sparse_add, lambda x, y, *rest: y.shape[1]
)
