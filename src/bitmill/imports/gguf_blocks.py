"""Blocks of GGUF as matrices that decode to the numbers of ggml to the bit.

    Q4_0, Q5_0, Q8_0          d * (q - middle)                          uniform, groups of 32
    Q4_1, Q5_1                d * q + m                                 affine, groups of 32
    Q3_K, Q6_K, IQ4_XS        (d * scale) * table[q]                    super_block
    Q2_K, Q4_K, Q5_K          (d * scale) * q - dmin * min              super_block_offset
    IQ4_NL                    d * table[q]                              signed_scale
    MXFP4                     2^(e - 127) * e2m1(q)                     microscaling

Their bits are those of the file.

Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.gguf_types import GGUF_TYPES, SMALL
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.quantized import Quantized
from bitmill.imports.matrices import evenly_spaced, scale_type, with_offset


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


def _of_type(kind: str, codes: Tensor, params: dict[str, Tensor]) -> Quantized:
    """Return a matrix in the format of a type.

    Args:
        kind: the type.
        codes: uint8 (rows, blocks, 256).
        params: (rows, blocks) or (rows, blocks, groups) each.
    """
    if not all(bool(torch.isfinite(value).all()) for value in params.values()):
        raise SourceError("A scale is NaN or infinite; fetch the model again.")
    groups = params["scale"].shape[-1]
    whole = {
        name: (value.float() if value.dim() == 3 else value[..., None].expand(-1, -1, groups)).flatten(1)
        for name, value in params.items()
    }
    codes = codes.flatten(1)
    return Quantized(GGUF_TYPES[kind], codes, whole, (codes.shape[0], codes.shape[1]))


def _q2_k(blocks: Tensor) -> Quantized:
    scales, data, d, least = blocks.split([16, 64, 2, 2], -1)
    params = {"scale": scales & 15, "minimum": scales >> 4, "d": _fp16(d), "dmin": _fp16(least)}
    return _of_type("Q2_K", _quarters(data), params)


def _q3_k(blocks: Tensor) -> Quantized:
    mask, data, packed, d = blocks.split([32, 64, 12, 2], -1)
    bits = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (mask[..., None, :] >> bits & 1).flatten(-2)
    low, top = packed[..., :8], packed[..., 8:]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    scales = _halves(low) | (top[..., None, :] >> shifts & 3).flatten(-2) << 4
    return _of_type("Q3_K", _quarters(data) | high << 2, {"scale": scales, "d": _fp16(d)})


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
        params = {"scale": scales, "minimum": minima, "d": _fp16(d), "dmin": _fp16(least)}
        return _of_type(f"Q{bits}_K", codes, params)

    return read


def _q6_k(blocks: Tensor) -> Quantized:
    low, high, scales, d = blocks.split([128, 64, 16, 2], -1)
    codes = _halves(low.unflatten(-1, (2, 64))).flatten(-2) | _quarters(high) << 4
    return _of_type("Q6_K", codes, {"scale": scales ^ 128, "d": _fp16(d)})


def _iq4_nl(blocks: Tensor) -> Quantized:
    codes, scale = _halves(blocks[..., 2:]).flatten(1), _fp16(blocks[..., :2])
    scale_type(scale)  # refuses NaN and infinities
    return Quantized(GGUF_TYPES["IQ4_NL"], codes, {"scale": scale}, (codes.shape[0], codes.shape[1]))


def _iq4_xs(blocks: Tensor) -> Quantized:
    d, high, low, data = blocks.split([2, 2, 4, 128], -1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    top = (high[..., None] >> shifts & 3).flatten(-2)
    scales = torch.stack([low & 15, low >> 4], -1).flatten(-2) | top << 4
    codes = _halves(data.unflatten(-1, (8, 16))).flatten(-2)
    return _of_type("IQ4_XS", codes, {"scale": scales, "d": _fp16(d)})


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
    Type.IQ4_NL: (18, _iq4_nl),
    Type.IQ4_XS: (136, _iq4_xs),
}
