"""Codes of E8 by lookup: a byte of signs and a byte that two tables turn into the sizes of eight coordinates.

`kernels.vector` looks whole points up in memory, one for eight weights. Here the two bytes of every code are taken
apart, once, when a layer is first used, so that those of 16 rows by 4 blocks lie side by side. A vector's lookups
then serve 512 weights, and give numbers of 4 bits that are multiplied as `kernels.lut` multiplies levels
(csrc/vector/lattice.h). No bit is added; rows are padded to 16 and columns to 32.

    inputs rounded to int8 or int16 as in `kernels.lut`; levels are exact

Scales of groups and inputs in float32 stay with `kernels.vector`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitmill.formats.e8 import E8
from bitmill.numerics import e8
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import CompiledKernel, cpu_unsupported_reason, tile_buffer
from bitmill.runtime.native import ACTIVATIONS, activations, native, threads

_ROWS, _BLOCKS = 16, 4  # of a square: csrc/vector/lattice.h
_SQUARE = _BLOCKS * e8.BLOCK  # columns


@KERNELS.register("lattice")
class Lattice(CompiledKernel):
    """Coordinates looked up, compiled for this machine's instruction set."""

    priority = 20
    tolerance = 2e-2

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """E8 with a scale a row or tensor, inputs rounded to integers."""
        format = spec.format
        if not isinstance(format, E8):
            return f"{format.name} is no lattice."
        if format.grid(spec.shape)[1] > 1:
            return f"{format!r} has scales of groups."
        return "inputs are to be float32." if activations() == "float32" else cpu_unsupported_reason(spec)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec, format, (rows, columns) = spec, spec.format, spec.shape
        assert isinstance(format, E8)
        self._scale, self._words = tensors["scale"], tensors["codes"].shape[1]
        width = -(-columns // _SQUARE) * _SQUARE
        self._plan = [rows, width, width, format.bits, _ROWS, width // _BLOCKS, ACTIVATIONS.index(activations())]
        scale = format.unpack_params(tensors, spec.shape)["scale"].flatten().contiguous()
        self._parts = [_in_squares(tensors["codes"].contiguous(), width // _SQUARE), _sizes(), scale]

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes and tables as the kernel reads them, and the packed scale."""
        names = ("codes", "sizes", "scales")
        held = {**dict(zip(names, self._parts)), "packed_scale": self._scale}
        return {f"lattice_{name}": tensor for name, tensor in held.items()}

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors, bit by bit."""
        return {"codes": _out_of_squares(self._parts[0], self.spec.shape[0], self._words), "scale": self._scale}

    def decoder(self) -> Callable[[slice], Tensor]:
        """Rounded as by the format."""
        layout = native().Layout(*self._plan[:-1])

        def weights(rows: slice) -> Tensor:
            out = tile_buffer(rows, self.spec.shape[1])
            native().lattice_decode(layout, *self._parts, rows.start, out, threads())
            return out

        return weights

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,): fp32 (n, in)."""
        return ops.lattice_rows(ids, self._parts, self._plan, self.spec.shape[1])

    def gemv(self, x: Tensor) -> Tensor:
        """By lookup."""
        return ops.lattice_linear(x, self._parts, self._plan)

    def step_linear(self) -> Any:
        """The same lookups for the decode step."""
        *layout, act = self._plan
        return native().step_lattice_linear(native().Layout(*layout), self.spec.shape[1], *self._parts, act)


def _sizes() -> Tensor:
    """Of every pattern the absolute values, less 1/2, in 2 bits each: uint8 (2, 256), of the coordinates below."""
    sizes = (e8.patterns() - 0.5).to(torch.uint8)[:, [[0, 1, 4, 5], [2, 3, 6, 7]]]
    return (sizes << torch.arange(0, 8, 2, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).T.contiguous()


def _in_squares(words: Tensor, squares: int) -> Tensor:
    """Codes int32 (rows, words) as bytes (tiles, squares, byte of a code, rows of a tile, blocks of a square)."""
    stored = words.view(torch.uint8)
    full = stored.new_zeros(-(-len(stored) // _ROWS) * _ROWS, squares * 2 * _BLOCKS)
    full[: stored.shape[0], : stored.shape[1]] = stored
    return full.view(-1, _ROWS, squares, _BLOCKS, 2).permute(0, 2, 4, 1, 3).contiguous()


def _out_of_squares(squares: Tensor, rows: int, words: int) -> Tensor:
    """The inverse."""
    stored = squares.permute(0, 3, 1, 4, 2).flatten(2).flatten(0, 1)
    return stored[:rows, : 4 * words].contiguous().view(torch.int32)
