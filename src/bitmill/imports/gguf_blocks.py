"""Blocks of GGUF as matrices that decode to the numbers of ggml to the bit.

    Q4_0, Q5_0, Q8_0          d * (q - middle)                          uniform, groups of 32
    Q4_1, Q5_1                d * q + m                                 affine, groups of 32
    Q3_K, Q6_K                (d * scale) * (q - middle)                uniform, groups of 16, scales in fp32
    Q2_K, Q4_K, Q5_K          (d * scale) * q - dmin * min              affine, groups of 16 or 32, in fp32
    MXFP4                     2^(e - 127) * e2m1(q)                     microscaling

The scales of K-types are themselves quantized; their products with d are stored in fp32, which is exact and takes
more bits than the file: 2 to 4 for each weight.

Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.quantized import Quantized
from bitmill.imports.matrices import evenly_spaced, with_offset

SMALL, SUPER = 32, 256  # weights of a block


def quantized(kind: Type, rows: np.ndarray) -> Quantized:
    """Return the matrix that blocks hold.

    Args:
        kind: of the blocks.
        rows: uint8 (rows, bytes).

    Raises:
        SourceError: no format holds such blocks to the bit, or a scale is NaN or infinite.
    """
    if kind not in _READERS:
        held = ", ".join(sorted(known.name for known in _READERS))
        raise SourceError(f"it is stored as {kind.name}, which no format holds to the bit; {held} are imported")
    size, read = _READERS[kind]
    blocks = torch.from_numpy(rows).view(rows.shape[0], -1, size)
    return read(blocks)


def _halves(data: Tensor) -> Tensor:
    """Return codes (..., 2n) of 4 bits in n bytes: the first n in low halves, the others in high ones."""
    return torch.cat([data & 15, data >> 4], -1)


def _fp16(data: Tensor) -> Tensor:
    """Return fp32 (rows, blocks) of two bytes a block."""
    return data.contiguous().view(torch.float16).float().squeeze(-1)


def _high_bits(data: Tensor) -> Tensor:
    """Return the bits (..., 8n) of n bytes, the lowest first."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _plain(bits: int) -> Callable[[Tensor], Quantized]:
    """Return the reader of Q4_0, Q5_0 and Q8_0."""

    def read(blocks: Tensor) -> Quantized:
        data = blocks[..., 2:]
        if bits == 8:
            codes = data ^ 128
        elif bits == 5:
            codes = _halves(data[..., 4:]) | _high_bits(data[..., :4]) << 4
        else:
            codes = _halves(data)
        return evenly_spaced(codes.flatten(1), _fp16(blocks[..., :2]), None, bits, SMALL)

    return read


def _with_minimum(bits: int) -> Callable[[Tensor], Quantized]:
    """Return the reader of Q4_1 and Q5_1."""

    def read(blocks: Tensor) -> Quantized:
        data = blocks[..., 4:]
        codes = _halves(data[..., 4:]) | _high_bits(data[..., :4]) << 4 if bits == 5 else _halves(data)
        return with_offset(codes.flatten(1), _fp16(blocks[..., :2]), _fp16(blocks[..., 2:4]), bits, SMALL)

    return read


def _mxfp4(blocks: Tensor) -> Quantized:
    scale, codes = blocks[..., 0], _halves(blocks[..., 1:]).flatten(1)
    if bool((scale == 255).any()):
        raise SourceError("a scale is NaN")
    return Quantized(Microscaling(4), codes, {"scale": scale.float()}, (codes.shape[0], codes.shape[1]))


def _quarters(data: Tensor) -> Tensor:
    """Return codes (rows, blocks, 256) of 2 bits in 64 bytes: four planes of 32 for each half of the block."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return (data.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-3)


def _groups(d: Tensor, scales: Tensor) -> Tensor:
    """Return d (rows, blocks) times scales (rows, blocks, n), fp32 (rows, blocks * n)."""
    return (d[..., None] * scales.float()).flatten(1)


def _q2_k(blocks: Tensor) -> Quantized:
    scales, data, d, least = blocks.split([16, 64, 2, 2], -1)
    offset = -_groups(_fp16(least), scales >> 4)
    return with_offset(_quarters(data).flatten(1), _groups(_fp16(d), scales & 15), offset, 2, 16)


def _q3_k(blocks: Tensor) -> Quantized:
    mask, data, packed, d = blocks.split([32, 64, 12, 2], -1)
    bits = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (mask[..., None, :] >> bits & 1).flatten(-2)
    low, top = packed[..., :8], packed[..., 8:]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    scales = _halves(low) | (top[..., None, :] >> shifts & 3).flatten(-2) << 4
    codes = (_quarters(data) | high << 2).flatten(1)
    return evenly_spaced(codes, _groups(_fp16(d), scales.to(torch.int16) - 32), None, 3, 16)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and 8 minima of 6 bits in 12 bytes, uint8 (..., 8) each."""
    first, second, third = packed.split(4, -1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    return scales, torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)


def _q4_or_5_k(bits: int) -> Callable[[Tensor], Quantized]:
    """Return the reader of Q4_K and Q5_K."""

    def read(blocks: Tensor) -> Quantized:
        d, least, packed, high, data = blocks.split([2, 2, 12, 32 * (bits - 4), 128], -1)
        scales, minima = _scales_and_minima(packed)
        codes = _halves(data.unflatten(-1, (4, 32))).flatten(-2)
        if bits == 5:
            planes = torch.arange(8, dtype=torch.uint8)[:, None]
            codes = codes | (high[..., None, :] >> planes & 1).flatten(-2) << 4
        offset = -_groups(_fp16(least), minima)
        return with_offset(codes.flatten(1), _groups(_fp16(d), scales), offset, bits, SMALL)

    return read


def _q6_k(blocks: Tensor) -> Quantized:
    low, high, scales, d = blocks.split([128, 64, 16, 2], -1)
    codes = _halves(low.unflatten(-1, (2, 64))).flatten(-2) | _quarters(high) << 4
    return evenly_spaced(codes.flatten(1), _groups(_fp16(d), scales.view(torch.int8)), None, 6, 16)


# by type: bytes of a block, and its reader
_READERS: dict[Type, tuple[int, Callable[[Tensor], Quantized]]] = {
    Type.Q4_0: (18, _plain(4)),
    Type.Q5_0: (22, _plain(5)),
    Type.Q8_0: (34, _plain(8)),
    Type.Q4_1: (20, _with_minimum(4)),
    Type.Q5_1: (24, _with_minimum(5)),
    Type.MXFP4: (17, _mxfp4),
    Type.Q2_K: (84, _q2_k),
    Type.Q3_K: (110, _q3_k),
    Type.Q4_K: (144, _q4_or_5_k(4)),
    Type.Q5_K: (176, _q4_or_5_k(5)),
    Type.Q6_K: (210, _q6_k),
}
