"""The bytes of GGUF's blocks of 256 columns, and of those of 32 with an offset.

A block holds its groups in order, with the bits of its codes in planes: byte j of 32 has a few bits of the weights
j, j + 32, j + 64 and so on. Scales of 6 bits are split into 4 and 2.

Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.formats.quantized import Quantized

Parts = list[Tensor]  # uint8 (rows, blocks, bytes) each


def halves(codes: Tensor) -> Tensor:
    """Return codes (..., 2n) of 4 bits in n bytes: the first n in low halves, the others in high ones."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def planes(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., 256) of 1 or 2 bits in planes of 32: (..., 32 * bits) bytes."""
    count = 8 // bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    split = codes.unflatten(-1, (-1, count, 32)) << shifts
    return split.sum(-2, dtype=torch.uint8).flatten(-2)


def fp16(values: Tensor, every: int) -> Tensor:
    """Return the number of every block, two bytes each: values (rows, groups), of which `every` make a block."""
    return values[:, ::every].to(torch.float16).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))


def _codes(quantized: Quantized) -> Tensor:
    return quantized.codes.unflatten(-1, (-1, 256))


def _integers(values: Tensor, groups: int) -> Tensor:
    """Return integers (rows, blocks, groups)."""
    return values.to(torch.uint8).unflatten(-1, (-1, groups))


def _q2_k(quantized: Quantized) -> Parts:
    params = quantized.params
    scales = _integers(params["scale"], 16) | _integers(params["minimum"], 16) << 4
    return [scales, planes(_codes(quantized), 2), fp16(params["d"], 16), fp16(params["dmin"], 16)]


def _q3_k(quantized: Quantized) -> Parts:
    codes, scales = _codes(quantized), _integers(quantized.params["scale"], 16)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    top = ((scales >> 4).unflatten(-1, (4, 4)) << shifts).sum(-2, dtype=torch.uint8)
    packed = [halves(scales & 15), top]
    return [planes(codes >> 2, 1), planes(codes & 3, 2), *packed, fp16(quantized.params["d"], 16)]


def _q4_or_5_k(quantized: Quantized) -> Parts:
    codes, params = _codes(quantized), quantized.params
    scales, minima = _integers(params["scale"], 8), _integers(params["minimum"], 8)
    first, second = (v[..., :4] | v[..., 4:] >> 4 << 6 for v in (scales, minima))
    third = scales[..., 4:] & 15 | (minima[..., 4:] & 15) << 4
    high = [planes(codes >> 4, 1)] if quantized.format.code_bits == 5 else []
    low = halves((codes & 15).unflatten(-1, (4, 64))).flatten(-2)
    return [fp16(params["d"], 8), fp16(params["dmin"], 8), first, second, third, *high, low]


def _q6_k(quantized: Quantized) -> Parts:
    codes, params = _codes(quantized), quantized.params
    low = halves((codes & 15).unflatten(-1, (2, 128))).flatten(-2)
    scales = _integers(params["scale"], 16) ^ 128  # as signed bytes
    return [low, planes(codes >> 4, 2), scales, fp16(params["d"], 16)]


def _iq4_xs(quantized: Quantized) -> Parts:
    codes, scales = _codes(quantized), _integers(quantized.params["scale"], 8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    high = ((scales >> 4).unflatten(-1, (2, 4)) << shifts).sum(-1, dtype=torch.uint8)
    low = scales[..., 0::2] & 15 | (scales[..., 1::2] & 15) << 4
    return [fp16(quantized.params["d"], 8), high, low, halves(codes.unflatten(-1, (8, 32))).flatten(-2)]


def _q4_or_5_1(quantized: Quantized) -> Parts:
    codes, params = quantized.codes.unflatten(-1, (-1, 32)), quantized.params
    bits = torch.arange(8, dtype=torch.uint8)
    high = ((codes >> 4).unflatten(-1, (4, 8)) << bits).sum(-1, dtype=torch.uint8)
    fifth = [high] if quantized.format.code_bits == 5 else []
    return [fp16(params["scale"], 1), fp16(params["offset"], 1), *fifth, halves(codes & 15)]


WRITERS: dict[str, Callable[[Quantized], Parts]] = {
    "Q4_1": _q4_or_5_1,
    "Q5_1": _q4_or_5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_or_5_k,
    "Q5_K": _q4_or_5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
