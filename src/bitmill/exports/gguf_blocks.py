"""Matrices in the block types of GGUF that hold them to the bit.

A block is 32 columns of a row with a scale in fp16. Integers less their zero, scaled:

    Q4_0  w = d (q - 8)    16 bytes, the first 16 codes in the low halves, the others in the high ones
    Q5_0  w = d (q - 16)   as Q4_0, and 4 bytes with the fifth bits before them
    Q8_0  w = d q          32 signed bytes
    MXFP4 w = 2^(e-127) e2m1(q), the codes as in Q4_0 and e in one byte

The smallest type whose range holds code - zero of the whole matrix is taken, so that codes with zeros fit too, at
the price of a bit or more; larger groups repeat their scale.

Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from bitmill.exports.base import Layer
from bitmill.exports.integers import grid, integers
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.quantized import Quantized

BLOCK = 32
_RANGES = {Type.Q4_0: (-8, 7), Type.Q5_0: (-16, 15), Type.Q8_0: (-128, 127)}  # smallest first


def unsupported_reason(layer: Layer) -> str | None:
    """Return why no block type holds a layer, as the end of a sentence."""
    if isinstance(layer.format, Microscaling):
        mxfp4 = (layer.format.element, layer.format.group_size) == ("e2m1", BLOCK)
        whole = layer.shape[1] % BLOCK == 0
        return None if mxfp4 and whole else "of microscaling formats gguf holds e2m1 in whole groups of 32 alone"
    found = grid(layer)
    if isinstance(found, str):
        return found
    if found.group % BLOCK:
        return f"its groups of {found.group} columns are no multiples of {BLOCK}; quantize with another group size"
    if found.bits == 8 and not found.symmetric:
        return "codes of 8 bits with zeros go beyond a byte; quantize with symmetric=true"
    return None


def blocks(quantized: Quantized) -> tuple[np.ndarray, Type]:
    """Return the bytes of a matrix that a block type holds, uint8 (rows, bytes), and the type."""
    if isinstance(quantized.format, Microscaling):
        scale = quantized.params["scale"].to(torch.uint8)[..., None]
        codes = quantized.codes.view(*scale.shape[:2], BLOCK)
        return _rows([scale, _halves(codes)]), Type.MXFP4
    matrix = integers(quantized)
    rows, groups = matrix.scale.shape
    values = matrix.codes.view(rows, groups, -1).to(torch.int16) - matrix.zero[..., None].to(torch.int16)
    low, high = int(values.min()), int(values.max())
    kind = next(kind for kind, (least, most) in _RANGES.items() if least <= low and high <= most)
    repeats = values.shape[-1] // BLOCK
    d = matrix.scale.repeat_interleave(repeats, 1).contiguous().view(torch.uint8).view(rows, -1, 2)
    values = values.reshape(rows, -1, BLOCK)
    if kind is Type.Q8_0:
        return _rows([d, values.to(torch.int8).view(torch.uint8)]), kind
    codes = (values - _RANGES[kind][0]).to(torch.uint8)
    if kind is Type.Q4_0:
        return _rows([d, _halves(codes)]), kind
    fifth = np.packbits((codes >> 4).numpy(), axis=-1, bitorder="little")
    return _rows([d, torch.from_numpy(fifth), _halves(codes & 15)]), kind


def _halves(codes: Tensor) -> Tensor:
    """Return codes (..., 32) of 4 bits in 16 bytes: the first 16 in low halves, the others in high ones."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _rows(parts: list[Tensor]) -> np.ndarray:
    """Return blocks (rows, blocks, bytes), given in parts, as rows of bytes."""
    joined: np.ndarray = torch.cat(parts, -1).flatten(1).contiguous().numpy()
    return joined
