"""Pyramid codes as small integers: the points of `formats.pyramid` looked up as `kernels.lut` looks up codes.

Numbers of points take some hundred cycles to decode, more than a product in floats takes. So they are decoded
once, when a layer is first used: a coordinate becomes a code of bits + 1 bits, a point keeps its gain, and its
length is summed beside the product (csrc/vector/relaid.h). Points with a coordinate beyond +-(2**bits - 1), one in
a hundred, are kept apart. That costs memory, 1.3 to 1.6 times the packed size, most at 2 bits, and makes the
product many times faster. Restoring numbers the points again.

    inputs rounded to int8 or int16 as in `kernels.lut`; sums of points in fp32, with relative error 1e-6

Other pyramids (1 bit, scales of groups, inputs in float32, numbers of no point) stay packed, see `kernels.vector`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitmill.formats.pyramid import LENGTHS, Pyramid
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import CompiledKernel, cpu_unsupported_reason, tile_buffer
from bitmill.runtime.kernels.vector import VectorKernel
from bitmill.runtime.native import ACTIVATIONS, activations, native, threads

_POINT, _ROWS, _BLOCKS = 16, 16, 4  # columns, rows of a tile, blocks of a point: csrc/vector/relaid.h


@KERNELS.register("points")
class Points(CompiledKernel):
    """Coordinates looked up, compiled for this machine's instruction set."""

    priority = 20
    tolerance = 2e-2

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Pyramids of 2 bits and more with a scale a row or tensor, inputs rounded to integers."""
        format = spec.format
        if not isinstance(format, Pyramid):
            return f"{format.name} is no pyramid."
        if format.bits < 2 or format.grid(spec.shape)[1] > 1:
            return f"{format!r} has 1 bit, or scales of groups."
        return "inputs are to be float32." if activations() == "float32" else cpu_unsupported_reason(spec)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec, format, (rows, columns) = spec, spec.format, spec.shape
        assert isinstance(format, Pyramid)
        self._bits, self._scale = format.bits, tensors["scale"]
        words, points = tensors["codes"].contiguous(), -(-columns // _POINT)
        y = torch.empty(rows, points * _POINT, dtype=torch.int8)
        gains = torch.empty(rows, points, dtype=torch.uint8)
        native().coordinates(format.bits, columns, words, y, gains, threads())
        self._packed: VectorKernel | None = None
        if not torch.equal(_numbers(format.bits, y, gains, words.shape), words):
            self._packed = VectorKernel(spec, tensors)
            return
        half = 1 << format.bits
        blocks = y.view(rows, points, _POINT)
        odd = blocks.abs().amax(-1) >= half
        codes = (y + half).to(torch.uint8)
        codes.view(rows, points, _POINT)[odd] = 0
        self._layout = [rows, points * _POINT, _POINT, format.bits + 1, _ROWS, _BLOCKS]
        layout = native().Layout(*self._layout)
        self._plan = [*self._layout, ACTIVATIONS.index(activations())]
        self._codes = torch.zeros(layout.code_bytes, dtype=torch.uint8)
        native().bytes_to_layout(layout, codes, self._codes, threads())
        starts = torch.zeros(rows + 1, dtype=torch.int32)
        torch.cumsum(odd.sum(1), 0, out=starts[1:])
        self._parts = [
            _in_pairs(gains, layout.tiles),
            torch.tensor(LENGTHS).repeat(16),
            format.unpack_params(tensors, spec.shape)["scale"].flatten().contiguous(),
            starts,
            odd.nonzero()[:, 1].to(torch.int32).contiguous(),
            blocks[odd].contiguous(),
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes, gains and odd points as the kernel reads them, and the packed scale."""
        if self._packed is not None:
            return self._packed.tensors
        names = ("gains", "lengths", "scales", "odd_starts", "odd_places", "odd_points")
        held = {"codes": self._codes, **dict(zip(names, self._parts)), "packed_scale": self._scale}
        return {f"points_{name}": tensor for name, tensor in held.items()}

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors, bit by bit."""
        if self._packed is not None:
            return self._packed.restore()
        rows, width = self._layout[:2]
        gains, _, _, starts, places, points = self._parts
        codes = torch.empty(rows, width, dtype=torch.uint8)
        native().codes_of(native().Layout(*self._layout), self._codes, 0, codes, threads())
        y = codes.to(torch.int8) - (1 << self._bits)
        which = torch.arange(rows).repeat_interleave((starts[1:] - starts[:-1]).long())
        y.view(rows, -1, _POINT)[which, places.long()] = points
        size = self.spec.format.layout(self.spec.shape)["codes"][0]
        words = _numbers(self._bits, y, _out_of_pairs(gains, y.shape), torch.Size(size))
        return {"codes": words, "scale": self._scale}

    def decoder(self) -> Callable[[slice], Tensor]:
        """Rounded as by the format."""
        if self._packed is not None:
            return self._packed.decoder()
        layout = native().Layout(*self._layout)

        def weights(rows: slice) -> Tensor:
            out = tile_buffer(rows, self.spec.shape[1])
            native().points_decode(layout, self._codes, *self._parts, rows.start, out, threads())
            return out

        return weights

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,): fp32 (n, in)."""
        if self._packed is not None:
            return self._packed.rows(ids)
        return ops.points_rows(ids, self._codes, self._parts, self._plan, self.spec.shape[1])

    def gemv(self, x: Tensor) -> Tensor:
        """By lookup."""
        if self._packed is not None:
            return self._packed.gemv(x)
        return ops.points_linear(x, self._codes, self._parts, self._plan)

    def step_linear(self) -> Any:
        """The same lookups for the decode step."""
        if self._packed is not None:
            return self._packed.step_linear()
        layout = native().Layout(*self._layout)
        return native().step_points_linear(layout, self.spec.shape[1], self._codes, *self._parts, self._plan[-1])


def _numbers(bits: int, y: Tensor, gains: Tensor, size: torch.Size) -> Tensor:
    words = torch.empty(size, dtype=torch.int32)
    native().numbers(bits, y, gains, words, threads())
    return words


def _in_pairs(gains: Tensor, tiles: int) -> Tensor:
    """(rows, points) to bytes, the gains of two points each: (tiles, pairs, rows of a tile)."""
    full = torch.zeros(tiles * _ROWS, gains.shape[1] + gains.shape[1] % 2, dtype=torch.uint8)
    full[: gains.shape[0], : gains.shape[1]] = gains
    pairs = full[:, ::2] | full[:, 1::2] << 4
    return pairs.unflatten(0, (tiles, _ROWS)).transpose(1, 2).contiguous()


def _out_of_pairs(pairs: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, for coordinates of `shape`."""
    rows = pairs.transpose(1, 2).flatten(0, 1)
    each = torch.stack([rows & 15, rows >> 4], -1).flatten(1)
    return each[: shape[0], : shape[1] // _POINT].contiguous()
