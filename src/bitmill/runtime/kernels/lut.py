"""Lookup kernels: codes stay packed, every code is an entry of a small table of bytes.

One compiled kernel serves every scalar format at 1 to 8 bits (csrc/lut). Up to 16 tokens at a time it reads the
codes once, rounds the inputs to integers with a step for every 16 to 64 columns, and sums exactly:

    int8   |error of y_r| <= sum over steps s of max|x_s| / 254 * sum of |W^_rs|, and where the format's levels
           are no round numbers 1/254 of a table's largest magnitude a weight (5 bits and more: 1/65534)
    int16  the same with 65024 in place of 254, and 65534 at every width

More tokens, or inputs that need gradients, decode tiles of rows and multiply in floats, as the reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.formats import ScalarFormat
from bitmill.formats.base import Params
from bitmill.runtime.byte_tables import byte_tables
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec
from bitmill.runtime.kernels.reference import by_tiles
from bitmill.runtime.native import ACTIVATIONS, activations, is_available, native, threads
from bitmill.runtime.ops import lut_linear, run_lut_linear

MOST_TOKENS = 16
_PARTS = ("tables", "ids", "powers", "scales", "zeros", "row_scales")  # in the order of csrc/bind.cpp
_FLOATS = ("powers", "row_scales")  # taken as fp32; the rest as bytes, whose type their number tells


@KERNELS.register("lut")
class Lut(Kernel):
    """Table lookup and dot products of bytes, compiled for this machine's instruction set."""

    priority = 10
    tolerance = 2e-2

    @staticmethod
    def supports(spec: KernelSpec) -> str | None:
        """Scalar formats of up to 8 bits on the CPU, where the compiled kernels are installed."""
        if not isinstance(spec.format, ScalarFormat):
            return f"{spec.format.name} is no table of single numbers."
        if spec.format.bits > 8:
            return f"{spec.format.name} has {spec.format.bits} bits, more than 8."
        if spec.device.type != "cpu":
            return f"it runs on cpu, not on {spec.device.type}."
        return None if is_available() else "the compiled kernels are not installed."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        format = spec.format
        assert isinstance(format, ScalarFormat)
        self.spec = spec
        self._words = tensors["codes"].shape[1]
        self._packed = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        params = format.unpack_params(tensors, spec.shape)
        act, columns = activations(), spec.shape[1]
        width = min(format.width(spec.shape), columns)
        made = byte_tables(
            format.lookup(params), spec.shape, width, format.bits, act == "int16" or format.bits > 4
        )
        self._layout = [*spec.shape, width, format.bits, made.rows_per_tile, made.group_blocks]
        self._plan = [*self._layout, made.source, int(made.wide), made.record_bytes, made.records_per_tile]
        self._plan += [made.bank_bits, ACTIVATIONS.index(act)]
        self._zero = made.zero
        self._parts = [_flat(getattr(made, name), name not in _FLOATS) for name in _PARTS]
        layout = native().Layout(*self._layout)
        self._codes = torch.zeros(layout.code_bytes, dtype=torch.uint8)
        native().to_layout(layout, tensors["codes"].contiguous(), self._codes, threads())

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes and tables as the kernel reads them, and the packed parameters, for decoding and restoring."""
        parts = {f"lut_{name}": part for name, part in zip(_PARTS, self._parts) if part is not None}
        packed = {f"lut_packed_{name}": tensor for name, tensor in self._packed.items()}
        return {"lut_codes": self._codes, **parts, **packed}

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors, bit by bit."""
        words = torch.empty(self.spec.shape[0], self._words, dtype=torch.int32)
        native().from_layout(native().Layout(*self._layout), self._codes, words, threads())
        return {"codes": words, **self._packed}

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        tokens = x.numel() // self.spec.shape[1]
        if not 0 < tokens <= MOST_TOKENS or (torch.is_grad_enabled() and x.requires_grad):
            return by_tiles(self.spec, self._params(), self._rows, x)
        flat = x.reshape(tokens, self.spec.shape[1]).to(torch.float32)
        # outside of a trace the operator's dispatch, some 40 us, would be most of a small layer's time
        run = run_lut_linear if type(flat) is Tensor and not torch.compiler.is_compiling() else lut_linear
        y = run(flat, self._codes, self._parts, self._plan, self._zero)
        return y.to(x.dtype).view(*x.shape[:-1], self.spec.shape[0])

    def _params(self) -> Params:
        return self.spec.format.unpack_params(self._packed, self.spec.shape)

    def _rows(self, rows: slice) -> Tensor:
        out = torch.empty(rows.stop - rows.start, self.spec.shape[1], dtype=torch.uint8)
        native().codes_of(native().Layout(*self._layout), self._codes, rows.start, out, threads())
        return out


def _flat(part: Tensor | None, as_bytes: bool) -> Tensor | None:
    if part is None:
        return None
    part = part.flatten().contiguous()
    return part.view(torch.uint8) if as_bytes else part
