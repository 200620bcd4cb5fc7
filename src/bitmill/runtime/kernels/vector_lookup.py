"""Vector codes repacked as small integers, which are looked up and multiplied as `kernels.lut` does with levels.

`kernels.vector` decodes whole vectors in the cache, one for 8 or 16 weights. The kernels here repack the codes
once, when a layer is first used, which costs memory or padding and makes the product many times faster.

    lattice  E8 (csrc/vector/lattice-inl.h): a byte of signs, and a byte that two tables turn into the sizes of
             eight coordinates. The bytes of 16 rows by 4 blocks are stored together, so that a vector's lookups
             serve 512 weights. No bit is added; rows are padded to 16 and columns to 32. Levels are exact.
    points   pyramids (csrc/vector/points-inl.h): the index of a point takes some hundred cycles to decode. A
             coordinate becomes a code of bits + 1 bits, a point keeps its gain, and its length is summed with
             the product. Points with a coordinate beyond +-(2**bits - 1), one in a hundred, are stored separately.
             Takes 1.3 to 1.6 times the packed size, most at 2 bits. Sums of points are fp32, with relative error
             1e-6.

Both round inputs to int8 or int16 as `kernels.lut` does. Scales of groups, inputs in float32, pyramids of 1 bit
and indices that are no point stay with `kernels.vector`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.e8 import E8
from bitmill.formats.pyramid import LENGTHS, Pyramid
from bitmill.native import native, threads
from bitmill.numerics import e8
from bitmill.runtime import ops
from bitmill.runtime.activations import ACTIVATIONS, activations
from bitmill.runtime.kernels.base import KERNELS, KernelSpec
from bitmill.runtime.kernels.compiled import CompiledKernel, cpu_unsupported_reason, tile_buffer
from bitmill.runtime.kernels.vector import VectorKernel

TILE_ROWS = 16  # csrc/vector/vector.h
_SQUARE_BLOCKS = 4  # csrc/vector/lattice-inl.h: blocks of 8 columns that are stored together
_SQUARE_COLUMNS = _SQUARE_BLOCKS * e8.BLOCK
_POINT_COLUMNS = 16  # csrc/vector/points-inl.h
_POINT_BLOCKS = 4  # of 64 codes


class VectorLookupKernel(CompiledKernel):
    """Base of kernels that hold `_parts`, the tensors of the extension's functions, and `_plan` (see `ops`)."""

    priority = 20
    tolerance = 2e-2
    operators: ClassVar[ops.VectorLookupOps]

    _parts: list[Tensor]
    _plan: list[int]

    def decoder(self) -> Callable[[slice], Tensor]:
        """Return a function that decodes rows, rounded as by the format."""

        def weights(rows: slice) -> Tensor:
            out = tile_buffer(rows, self.spec.shape[1])
            self.operators.decode(self._parts, self._plan, rows.start, out)
            return out

        return weights

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        return self.operators.rows(ids, self._parts, self._plan, self.spec.shape[1])

    def gemv(self, x: Tensor) -> Tensor:
        """Multiply a few tokens (tokens, in) by lookup."""
        return self.operators.linear(x, self._parts, self._plan)


def _unsupported_reason(spec: KernelSpec) -> str | None:
    format = spec.format
    if isinstance(format, GroupFormat) and format.grid(spec.shape)[1] > 1:
        return f"{format!r} has scales of groups."
    exact = spec.exact or activations().few == "float32"
    return "inputs are to be float32." if exact else cpu_unsupported_reason(spec)


@KERNELS.register("lattice")
class Lattice(VectorLookupKernel):
    """Signs and sizes of E8's coordinates, looked up."""

    operators = ops.lattice

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for E8 with one scale per row or tensor and inputs rounded to integers, or the reason."""
        return _unsupported_reason(spec) if isinstance(spec.format, E8) else f"{spec.format.name} is no lattice."

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec, format, (rows, columns) = spec, spec.format, spec.shape
        assert isinstance(format, E8)
        self._scale, self._words = tensors["scale"], tensors["codes"].shape[1]
        width = -(-columns // _SQUARE_COLUMNS) * _SQUARE_COLUMNS
        layout = [rows, width, width, format.bits, TILE_ROWS, width // _SQUARE_BLOCKS]
        self._plan = [*layout, ACTIVATIONS.index(activations().few)]
        scale = format.unpack_params(tensors, spec.shape)["scale"].flatten().contiguous()
        self._parts = [_to_squares(tensors["codes"].contiguous(), width // _SQUARE_COLUMNS), _sizes(), scale]

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes and tables as the kernel reads them, and the packed scale."""
        names = ("codes", "sizes", "scales")
        held = {**dict(zip(names, self._parts)), "packed_scale": self._scale}
        return {f"lattice_{name}": tensor for name, tensor in held.items()}

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, bit by bit."""
        return {"codes": _from_squares(self._parts[0], self.spec.shape[0], self._words), "scale": self._scale}

    def step_linear(self) -> Any:
        """Return the matrix for the decode step."""
        *layout, act = self._plan
        return native().step_lattice_linear(native().Layout(*layout), self.spec.shape[1], *self._parts, act)


def _sizes() -> Tensor:
    """Return sizes less 1/2 of every pattern, 2 bits each: uint8 (2, 256), of the coordinates listed here."""
    sizes = (e8.patterns() - 0.5).to(torch.uint8)[:, [[0, 1, 4, 5], [2, 3, 6, 7]]]
    return (sizes << torch.arange(0, 8, 2, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).T.contiguous()


def _to_squares(words: Tensor, squares: int) -> Tensor:
    """Return codes int32 (rows, words) as bytes (tiles, squares, 2 bytes of a code, 16 rows, 4 blocks)."""
    stored = words.view(torch.uint8)
    full = stored.new_zeros(-(-len(stored) // TILE_ROWS) * TILE_ROWS, squares * 2 * _SQUARE_BLOCKS)
    full[: stored.shape[0], : stored.shape[1]] = stored
    return full.view(-1, TILE_ROWS, squares, _SQUARE_BLOCKS, 2).permute(0, 2, 4, 1, 3).contiguous()


def _from_squares(squares: Tensor, rows: int, words: int) -> Tensor:
    """Invert `_to_squares`."""
    stored = squares.permute(0, 3, 1, 4, 2).flatten(2).flatten(0, 1)
    return stored[:rows, : 4 * words].contiguous().view(torch.int32)


@KERNELS.register("points")
class Points(VectorLookupKernel):
    """Coordinates of a pyramid's points, looked up; a VectorKernel where an index is no point."""

    operators = ops.points

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for pyramids of 2 bits or more with one scale per row or tensor, or the reason."""
        if not isinstance(spec.format, Pyramid):
            return f"{spec.format.name} is no pyramid."
        return f"{spec.format!r} has 1 bit." if spec.format.bits < 2 else _unsupported_reason(spec)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec, format, (rows, columns) = spec, spec.format, spec.shape
        assert isinstance(format, Pyramid)
        self._bits, self._scale = format.bits, tensors["scale"]
        words, points = tensors["codes"].contiguous(), -(-columns // _POINT_COLUMNS)
        y = torch.empty(rows, points * _POINT_COLUMNS, dtype=torch.int8)
        gains = torch.empty(rows, points, dtype=torch.uint8)
        native().coordinates(format.bits, columns, words, y, gains, threads())
        self._fallback: VectorKernel | None = None
        if not torch.equal(_indices(format.bits, y, gains, words.shape), words):
            self._fallback = VectorKernel(spec, tensors)
            return
        layout = [rows, points * _POINT_COLUMNS, _POINT_COLUMNS, format.bits + 1, TILE_ROWS, _POINT_BLOCKS]
        self._plan = [*layout, ACTIVATIONS.index(activations().few)]
        scales = format.unpack_params(tensors, spec.shape)["scale"].flatten().contiguous()
        self._parts = self._repack(native().Layout(*layout), y, gains, scales)

    def _repack(self, layout: Any, y: Tensor, gains: Tensor, scales: Tensor) -> list[Tensor]:
        """Return codes, gains, lengths, scales, and the odd points (starts, places, coordinates)."""
        half, rows = 1 << self._bits, len(y)
        blocks = y.view(rows, -1, _POINT_COLUMNS)
        odd = blocks.abs().amax(-1) >= half
        codes = (y + half).to(torch.uint8)
        codes.view(blocks.shape)[odd] = 0
        repacked = torch.zeros(layout.code_bytes, dtype=torch.uint8)
        native().bytes_to_layout(layout, codes, repacked, threads())
        starts = torch.zeros(rows + 1, dtype=torch.int32)
        torch.cumsum(odd.sum(1), 0, out=starts[1:])
        places = odd.nonzero()[:, 1].to(torch.int32).contiguous()
        lengths = torch.tensor(LENGTHS).repeat(16)
        return [
            repacked,
            _to_pairs(gains, layout.tiles),
            lengths,
            scales,
            starts,
            places,
            blocks[odd].contiguous(),
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes, gains and odd points as the kernel reads them, and the packed scale."""
        if self._fallback is not None:
            return self._fallback.tensors
        names = ("codes", "gains", "lengths", "scales", "odd_starts", "odd_places", "odd_points")
        held = {**dict(zip(names, self._parts)), "packed_scale": self._scale}
        return {f"points_{name}": tensor for name, tensor in held.items()}

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, bit by bit."""
        if self._fallback is not None:
            return self._fallback.restore()
        repacked, gains, _, _, starts, places, points = self._parts
        rows, width = self._plan[:2]
        codes = torch.empty(rows, width, dtype=torch.uint8)
        native().codes_of(native().Layout(*self._plan[:6]), repacked, 0, codes, threads())
        y = codes.to(torch.int8) - (1 << self._bits)
        odd_rows = torch.arange(rows).repeat_interleave((starts[1:] - starts[:-1]).long())
        y.view(rows, -1, _POINT_COLUMNS)[odd_rows, places.long()] = points
        size = self.spec.format.layout(self.spec.shape)["codes"][0]
        words = _indices(self._bits, y, _from_pairs(gains, y.shape), torch.Size(size))
        return {"codes": words, "scale": self._scale}

    def decoder(self) -> Callable[[slice], Tensor]:
        """Return a function that decodes rows, rounded as by the format."""
        return super().decoder() if self._fallback is None else self._fallback.decoder()

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        return super().rows(ids) if self._fallback is None else self._fallback.rows(ids)

    def gemv(self, x: Tensor) -> Tensor:
        """Multiply a few tokens (tokens, in) by lookup."""
        return super().gemv(x) if self._fallback is None else self._fallback.gemv(x)

    def step_linear(self) -> Any:
        """Return the matrix for the decode step."""
        if self._fallback is not None:
            return self._fallback.step_linear()
        *layout, act = self._plan
        return native().step_points_linear(native().Layout(*layout), self.spec.shape[1], *self._parts, act)


def _indices(bits: int, y: Tensor, gains: Tensor, size: torch.Size) -> Tensor:
    """Return the packed indices int32 `size` of points with coordinates y and gains."""
    words = torch.empty(size, dtype=torch.int32)
    native().numbers(bits, y, gains, words, threads())
    return words


def _to_pairs(gains: Tensor, tiles: int) -> Tensor:
    """Return gains (rows, points) as bytes of two points each: (tiles, pairs, 16 rows)."""
    full = torch.zeros(tiles * TILE_ROWS, gains.shape[1] + gains.shape[1] % 2, dtype=torch.uint8)
    full[: gains.shape[0], : gains.shape[1]] = gains
    pairs = full[:, ::2] | full[:, 1::2] << 4
    return pairs.unflatten(0, (tiles, TILE_ROWS)).transpose(1, 2).contiguous()


def _from_pairs(pairs: Tensor, shape: torch.Size) -> Tensor:
    """Invert `_to_pairs` for coordinates of `shape`."""
    rows = pairs.transpose(1, 2).flatten(0, 1)
    each = torch.stack([rows & 15, rows >> 4], -1).flatten(1)
    return each[: shape[0], : shape[1] // _POINT_COLUMNS].contiguous()
