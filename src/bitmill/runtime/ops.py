"""The compiled kernels as torch operators, so that tracing and compiling see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.native import native, threads


class Operator:
    """A product with a matrix: x (tokens, in) fp32 and constant tensors to (tokens, out).

    Outside of traces the plain function is called: the dispatch of an operator takes about 40 us, most of the time
    of a small layer.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable[..., Tensor],
        out_features: Callable[..., int],
        device: str | None = "cpu",
    ) -> None:
        """Register the operator `bitmill::name`.

        Args:
            name: Name of the operator.
            schema: Schema of the arguments after x.
            run: The function of x and these arguments.
            out_features: Number of outputs of a token, a function of all arguments.
            device: Type of device it runs on; None for every type.
        """
        self.run = run
        self.op = torch.library.custom_op(
            f"bitmill::{name}", run, mutates_args=(), device_types=device, schema=f"(Tensor x, {schema}) -> Tensor"
        )
        self.op.register_fake(lambda x, *rest: x.new_empty(x.shape[0], out_features(x, *rest)))
        self.op.register_vmap(self._batched)

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """Return the outputs (tokens, out)."""
        return self.op(x, *rest) if is_traced(x) else self.run(x, *rest)

    def _batched(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        """Run one element of the batch after the other, for torch.vmap."""
        each = [
            self.op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims)))
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return FORMATS.from_dict(json.loads(text))


@lru_cache(maxsize=256)
def format_to_json(format: Format) -> str:
    """Return the format as JSON, the form in which operators take it."""
    return json.dumps(format.to_dict())


# -- Rows of W^ (n, in), fp32, in fresh memory: traces decode with these ---------------------------------------


def _fake_rows(of: Tensor, ids: Tensor, columns: int) -> Tensor:
    return of.new_empty(ids.shape[0], columns, dtype=torch.float32)


@torch.library.custom_op("bitmill::packed_rows", mutates_args=())
def packed_rows(ids: Tensor, tensors: list[Tensor], format: str, shape: list[int]) -> Tensor:
    """Decode rows of a matrix from its packed tensors.

    Args:
        ids: int64 (n,), the rows.
        tensors: Packed tensors in the order of `format.layout`.
        format: `format_to_json` of the format.
        shape: (out, in).

    Returns:
        fp32 (n, in).
    """
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
    """Decode rows of a matrix whose codes are in the layout of csrc/lut/layout.h.

    Args:
        ids: int64 (n,), the rows.
        codes: uint8, codes in that layout.
        packed: All other packed tensors, in the order of `format.layout`.
        layout: Arguments of the extension's Layout.
        format: `format_to_json` of the format.
        shape: (out, in).

    Returns:
        fp32 (n, in).
    """
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


def _decode_rows(ids: Tensor, rows: int, columns: int, decode: Callable[[int, Tensor], None]) -> Tensor:
    """Return rows (n, columns) of a matrix of `rows` rows; decode(first, out) decodes consecutive rows."""
    indices, out = ids.tolist(), torch.empty(len(ids), columns)
    if indices and not 0 <= min(indices) <= max(indices) < rows:
        raise IndexError(f"rows {min(indices)} to {max(indices)} of a matrix that has {rows}")
    if indices and indices == list(range(indices[0], indices[0] + len(indices))):
        decode(indices[0], out)
        return out
    for i, row in enumerate(indices):
        decode(row, out[i : i + 1])
    return out


# -- Products --------------------------------------------------------------------------------------------------


class VectorLookupOps:
    """Operators of vector codes that were repacked for lookup (`kernels.vector_lookup`).

    Both take `parts`, the tensors of the extension's functions in their order, codes first, and `plan`, the six
    arguments of Layout, which start with the number of rows, and the type of activations.
    """

    def __init__(self, kind: str) -> None:
        """Register `kind`_rows and `kind`_linear, which call the extension's `kind`_decode and `kind`_linear."""
        self._kind = kind
        self.rows = torch.library.custom_op(
            f"bitmill::{kind}_rows",
            self._rows,
            mutates_args=(),
            device_types="cpu",
            schema="(Tensor ids, Tensor[] parts, int[] plan, int columns) -> Tensor",
        )
        self.rows.register_fake(lambda ids, parts, plan, columns: _fake_rows(parts[0], ids, columns))
        self.linear = Operator(
            f"{kind}_linear", "Tensor[] parts, int[] plan", self._linear, lambda x, parts, plan: plan[0]
        )

    def decode(self, parts: list[Tensor], plan: list[int], first: int, out: Tensor) -> None:
        """Decode consecutive rows.

        Args:
            parts: As of the operators.
            plan: As of the operators.
            first: The first row.
            out: fp32 (count, in), filled with rows.
        """
        getattr(native(), f"{self._kind}_decode")(native().Layout(*plan[:6]), *parts, first, out, threads())

    def _rows(self, ids: Tensor, parts: list[Tensor], plan: list[int], columns: int) -> Tensor:
        return _decode_rows(ids, plan[0], columns, lambda first, out: self.decode(parts, plan, first, out))

    def _linear(self, x: Tensor, parts: list[Tensor], plan: list[int]) -> Tensor:
        y = torch.empty(x.shape[0], plan[0])
        multiply = getattr(native(), f"{self._kind}_linear")
        multiply(native().Layout(*plan[:6]), *parts, plan[6], x.contiguous(), y, threads())
        return y


def _lut_linear(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """Multiply by table lookup; arguments as in `kernels.lut`; plan starts with (out, in)."""
    *parts, plan, zero = rest
    library = native()
    y = torch.empty(x.shape[0], plan[0])
    source, wide, mirrored, record_bytes, records, bank_bits, act = plan[6:]
    tables = (source, bool(wide), bool(mirrored), record_bytes, records, bank_bits, zero)
    library.linear(library.Layout(*plan[:6]), *tables, codes, *parts, act, x.contiguous(), y, threads())
    return y


def _additive(x: Tensor, codes: Tensor, books: Tensor, scales: Tensor, layout: list[int]) -> Tensor:
    """Multiply with sums of codebook vectors; arguments as in `kernels.additive`; layout starts with `out`."""
    y = torch.empty(x.shape[0], layout[0])
    native().additive(native().Layout(*layout), codes, books, scales, x.contiguous(), y, threads())
    return y


def _vector_linear(x: Tensor, parts: list[Tensor], plan: list[int]) -> Tensor:
    """Multiply with rows decoded in the cache; parts and plan as in `kernels.vector`; codes (out, words) first."""
    y = torch.empty(x.shape[0], parts[0].shape[0])
    native().vector_linear(*plan, *parts, x.contiguous(), y, threads())
    return y


def _rotate(x: Tensor, steps: Tensor, numbers: Tensor, orders: Tensor) -> Tensor:
    """Rotate rows of x; steps, numbers and orders as in `kernels.rotation_plan`."""
    y = x.clone(memory_format=torch.contiguous_format)
    native().rotate(steps, numbers, orders, y, threads())
    return y


def _sparse_add(x: Tensor, y: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return y (tokens, out) plus the product of x with a sparse matrix in CSR form."""
    out = y.clone(memory_format=torch.contiguous_format)
    native().sparse_add(starts, columns, values, x.contiguous(), out, threads())
    return out


lut_linear = Operator(
    "lut_linear",
    "Tensor codes, Tensor? tables, Tensor? ids, Tensor? powers, Tensor? scales, Tensor? zeros, "
    "Tensor? row_scales, int[] plan, float zero",  # torch.jit.trace has no lists of optional tensors
    _lut_linear,
    lambda x, *rest: rest[-2][0],
)
additive = Operator(
    "additive",
    "Tensor codes, Tensor books, Tensor scales, int[] layout",
    _additive,
    lambda x, codes, books, scales, layout: layout[0],
)
vector_linear = Operator(
    "vector_linear", "Tensor[] parts, int[] plan", _vector_linear, lambda x, parts, plan: parts[0].shape[0]
)
points = VectorLookupOps("points")
lattice = VectorLookupOps("lattice")
rotate = Operator("rotate", "Tensor steps, Tensor numbers, Tensor orders", _rotate, lambda x, *rest: x.shape[1])
sparse_add = Operator(
    "sparse_add",
    "Tensor y, Tensor starts, Tensor columns, Tensor values",
    _sparse_add,
    lambda x, y, *rest: y.shape[1],
)
