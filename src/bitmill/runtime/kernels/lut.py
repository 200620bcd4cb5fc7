"""Lookup kernels: codes stay packed, and every code selects an entry of a small table of bytes.

One compiled kernel supports every scalar format of 1 to 8 bits (csrc/lut). Up to 16 tokens at a time it reads the
codes once, rounds the inputs to integers with a step for every 16 to 64 columns, and sums exactly:

    int8   |error of y_r| <= sum over steps s of max|x_s| / 254 * sum of |W^_rs|, and where the format's levels
           are no round numbers 1/254 of a table's largest magnitude a weight (5 bits and more: 1/65534)
    int16  as int8 with 65024 in place of 254, and 65534 at every width
    float32  no rounding: fp32 tables, inputs and sums

More tokens multiply integers (csrc/fixed): of 16 bits, with tables that are exact or else with decoded tiles. Or,
where `runtime.activations` says int8, of 8 bits with tables of bytes at every width: the error is that of int8,
with a step for every 64 columns or as many as the setting says.

Rounding tables to bytes matters for free-form levels (codebooks, binary coding) of up to 4 bits. With m a table's
largest magnitude it adds an error of RMS m / 440 to each weight, 0.7 % of their RMS where m is three times that
RMS; rounding Gaussian inputs to int8 changes an output by about 0.5 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmill.compat import is_traced
from bitmill.errors import UsageError
from bitmill.formats import ScalarFormat
from bitmill.formats.base import Params
from bitmill.native import native, threads, unsupported_reason
from bitmill.runtime import ops
from bitmill.runtime.activations import ACTIVATIONS, Activations, activations
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import RepackedKernel, cpu_unsupported_reason, tile_buffer
from bitmill.runtime.kernels.lut_tables import Entries, LookupTables, lookup_tables, without_zero
from bitmill.runtime.kernels.reference import RowDecoder

_PARTS = ("tables", "ids", "powers", "scales", "zeros", "row_scales")  # in the order of csrc/bind.cpp
_Tables = tuple[list[int], float, list[Tensor | None]]
_FLOATS = ("powers", "row_scales")  # passed as fp32; the others as bytes, whose type follows from their number


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels of inputs (csrc/lut/grid.h).

    Attributes:
        bits: Bits of a code.
        width: Columns of a token that share a scale.
        symmetric: The number 0 has the middle code.
        scale: Scale of all inputs; 0 for those of each token.
        zero: Code of the number 0 where scale is given.
        threshold: Columns in which an input reaches it are not rounded; 0 for none.
    """

    bits: int
    width: int
    symmetric: bool
    scale: float = 0.0
    zero: float = 0.0
    threshold: float = 0.0


@KERNELS.register("lut")
class Lut(RepackedKernel):
    """Table lookup and dot products of bytes, compiled for this machine's instruction set."""

    tolerance = 2e-2
    _native: tuple[int, Any] | None = None
    _native_panels: tuple[int, Any] | None = None
    _bytes: _Tables | None = None  # for many tokens in int8, where those of a few tokens are no bytes

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for scalar formats of up to 8 bits on the CPU, or the reason."""
        if not isinstance(spec.format, ScalarFormat):
            return f"{spec.format.name} is no table of single numbers."
        if spec.format.bits > 8:
            return f"{spec.format.name} has {spec.format.bits} bits, more than 8."
        if spec.format.one_sided:
            return f"{spec.format.name} has most levels at one end, where tables in bytes are too coarse."
        return cpu_unsupported_reason(spec)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        format = spec.format
        assert isinstance(format, ScalarFormat)
        params = format.unpack_params(tensors, spec.shape)
        self.activations = Activations("float32", "float32") if spec.exact else activations()
        columns = spec.shape[1]
        act = self.activations.few
        width = min(format.width(spec.shape), columns)
        kind: Entries = "floats" if act == "float32" else "words" if act == "int16" or format.bits > 4 else "bytes"
        made = lookup_tables(format.lookup(params), spec.shape, width, format.bits, kind)
        self._width = width
        super().__init__(spec, tensors, [*spec.shape, width, format.bits, made.rows_per_tile, made.group_blocks])
        self.plan, self.zero, self.parts = _plan(self.layout, made, act)
        self.is_exact, self._wide = made.is_exact, made.wide
        self._are_bytes = kind != "floats" and not made.wide
        if self.activations.many == "int8":
            self._byte_tables()

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes and tables as the kernel reads them, and the packed parameters."""
        parts = {name: part for name, part in zip(_PARTS, self.parts) if part is not None}
        if self._bytes is not None:
            parts |= {f"int8_{name}": part for name, part in zip(_PARTS, self._bytes[2]) if part is not None}
        return self.named_tensors("lut", parts)

    def output_error(self, W: Tensor) -> Tensor:
        """Return the error of rounded inputs, of sums in fp32 and, where tables are rounded, of a step of each."""
        format, columns = self.spec.format, self.spec.shape[1]
        assert isinstance(format, ScalarFormat)
        step = 2.0**-20 if self.is_exact else 1 / (32767 if self._wide else 127)
        rms = format.lookup(self._params()).largest().square().mean(1).sqrt()
        return torch.hypot(super().output_error(W), step * columns**0.5 * rms)

    def decoder(self) -> RowDecoder:
        """Return a function that decodes rows by table lookup in fp32, each weight as the format computes it."""
        params, layout = self._params(), native().Layout(*self.layout)

        def weights(rows: slice) -> Tensor:
            numbers = self._float_numbers({k: v if v.shape[0] == 1 else v[rows] for k, v in params.items()})
            out = tile_buffer(rows, self.spec.shape[1])
            native().decode(layout, self.codes, *numbers, rows.start, out, threads())
            return out

        return weights

    def _float_numbers(self, params: Params) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return tables, their numbers, factors and zeros of rows in fp32, as the extension decodes codes."""
        format = self.spec.format
        assert isinstance(format, ScalarFormat)
        found = format.lookup(params)
        found = found if found.offset is None else without_zero(found)
        tables = torch.nn.functional.pad(found.tables.flatten(), (0, 64))  # whole vectors are read
        ids = None if found.table is None else found.table.to(torch.int32).contiguous()
        return tables, ids, found.factor().contiguous(), found.zero.contiguous()

    def _float_codes(self) -> Any:
        """Return the extension's view of all rows with these numbers."""
        return native().codes(native().Layout(*self.layout), self.codes, *self._float_numbers(self._params()))

    def gemv(self, x: Tensor) -> Tensor:
        """Multiply a few tokens (tokens, in) by table lookup."""
        if is_traced(x):
            return ops.lut_linear(x, self.codes, *self.parts, self.plan, self.zero)
        y = torch.empty(x.shape[0], self.spec.shape[0])
        self._bound().product(x.contiguous(), y, threads())
        return y

    def gemm(self, x: Tensor) -> Tensor:
        """Multiply many tokens (tokens, in), by table lookup where the tables are exact."""
        setting = self.activations
        panels = self._panels() if self._multiplies_bytes() else None
        if panels is None:
            return super().gemm(x)
        y = torch.empty(x.shape[0], self.spec.shape[0])
        act, step = ("int8", setting.step_columns) if setting.many == "int8" else ("int16", 0)
        panels.product(x.contiguous(), y, ACTIVATIONS.index(act), step, threads())
        return y

    def multiply_codes(self, codes: Tensor, scales: Tensor, step_columns: int) -> Tensor:
        """Multiply tokens that are integers already (see `kernels.int8_linear`).

        Args:
            codes: int8 (tokens, in).
            scales: fp32 (tokens, steps), the size of a token's codes in every `step_columns` columns.
            step_columns: Columns that share a scale, as in `Activations`, but not 0.

        Returns:
            fp32 (tokens, out).
        """
        panels, y = self._panels(), torch.empty(codes.shape[0], self.spec.shape[0])
        if panels is None:
            raise UsageError(f"{unsupported_reason('panel_linear')}")
        panels.product_of_codes(codes.contiguous(), scales.contiguous(), y, step_columns, threads())
        return y

    def _bound(self) -> Any:
        """Return the extension's view of the tensors, made once: that takes as long as a small layer."""
        if self._native is None or self._native[0] != self.codes.data_ptr():  # moved, for example to shared memory
            made = self._made(native().lookup_linear, self.plan, self.zero, self.parts)
            self._native = self.codes.data_ptr(), made
        return self._native[1]

    def _panels(self) -> Any:
        """Return the extension's view for many tokens, with tables of bytes; None if the extension is too old."""
        if unsupported_reason("panel_linear") is not None:
            return None
        if self._native_panels is None or self._native_panels[0] != self.codes.data_ptr():
            tables = self._byte_tables() or (self.plan, self.zero, self.parts)
            self._native_panels = self.codes.data_ptr(), self._made(native().panel_linear, *tables)
        return self._native_panels[1]

    def _byte_tables(self) -> _Tables | None:
        """Return the tables as bytes, or None where those of a few tokens are bytes. Made once."""
        if self._bytes is None and not self._are_bytes:
            format, params = self.spec.format, self._params()
            assert isinstance(format, ScalarFormat)
            made = lookup_tables(format.lookup(params), self.spec.shape, self._width, format.bits, "bytes")
            if [made.rows_per_tile, made.group_blocks] != self.layout[-2:]:
                raise UsageError(
                    "The layer was loaded for inputs in float32; set BITMILL_ACTIVATIONS to int8 or int16."
                )
            self._bytes = _plan(self.layout, made, "int8")
        return self._bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_native_panels": None}

    def step_linear(self) -> Any:
        """Return the matrix for the decode step."""
        return self._bound()

    @contextmanager
    def reading_prompt(self) -> Iterator[None]:
        """Let the matrix of the step multiply many tokens, as `gemm` or, without rounding, by decoded rows."""
        if unsupported_reason("Codes") is not None:
            yield
            return
        rounds = activations().many != "float32" and not self.spec.exact
        panels = self._panels() if rounds and self._multiplies_bytes() else None
        codes = self._float_codes() if panels is None else None
        setting = self.activations
        act, step = ("int8", setting.step_columns) if setting.many == "int8" else ("int16", 0)
        self._bound().read_pieces(panels, ACTIVATIONS.index(act), step, codes)
        try:
            yield
        finally:  # the numbers of groups in fp32 take memory
            self._bound().read_pieces(None, 0, 0, None)

    def _multiplies_bytes(self) -> bool:
        """Return True if many tokens multiply with tables of bytes."""
        return self.activations.many == "int8" or (self.is_exact and self._are_bytes)

    def grid_linear(self, inputs: Grid) -> Any:
        """Return the extension's view for a few tokens whose inputs are rounded to a grid; None if it has none."""
        if self.activations.few == "float32" or unsupported_reason("lookup_columns") is not None:
            return None
        try:
            levels = (inputs.bits, inputs.width, inputs.symmetric, inputs.scale, inputs.zero, inputs.threshold)
            return native().grid_linear(self._bound(), *levels)
        except ValueError:  # groups of both that do not fit
            return None

    def columns(self, ids: Tensor) -> Tensor:
        """Return columns of W^, int64 (n,): fp32 (out, n)."""
        if unsupported_reason("lookup_columns") is not None:
            return self.weights(slice(0, self.spec.shape[0]))[:, ids]
        out = torch.empty(self.spec.shape[0], len(ids))
        native().lookup_columns(self._bound(), ids.contiguous(), out, threads())
        return out

    def _made(self, make: Any, plan: list[int], zero: float, parts: list[Tensor | None]) -> Any:
        source, wide, mirrored, record_bytes, records, bank_bits, act = plan[6:]
        tables = (source, bool(wide), bool(mirrored), record_bytes, records, bank_bits, zero)
        return make(native().Layout(*self.layout), *tables, self.codes, *parts, act)


def _plan(layout: list[int], made: LookupTables, act: str) -> _Tables:
    """Return the numbers, the constant zero and the tensors that the extension takes with the codes."""
    numbers = [made.source, int(made.wide), int(made.mirrored), made.record_bytes, made.records_per_tile]
    plan = [*layout, *numbers, made.bank_bits, ACTIVATIONS.index(act)]
    return plan, made.zero, [_flat(getattr(made, name), name not in _FLOATS) for name in _PARTS]


def _flat(part: Tensor | None, as_bytes: bool) -> Tensor | None:
    if part is None:
        return None
    part = part.flatten().contiguous()
    return part.view(torch.uint8) if as_bytes else part
