"""Matrices in the block types of GGUF that hold them to the bit.

A block is 32 columns of a row with a scale in fp16. Integers less their zero, scaled:

    Q4_0  w = d (q - 8)    16 bytes, the first 16 codes in the low halves, the others in the high ones
    Q5_0  w = d (q - 16)   as Q4_0, and 4 bytes with the fifth bits before them
    Q8_0  w = d q          32 signed bytes
    MXFP4 w = 2^(e-127) e2m1(q), the codes as in Q4_0 and e in one byte

and IQ4_NL, a table of 16 numbers with the bytes of Q4_0; `gguf_super_blocks` has the others. A format that is one
of `formats.gguf_types` is written as this type. Of other evenly spaced levels the smallest type is taken that
holds code - zero of the whole matrix, so that codes with zeros fit too, at the price of a bit or more; larger
groups repeat their scale.

Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from bitmill.exports.base import Layer
from bitmill.exports.gguf_super_blocks import WRITERS, fp16, halves
from bitmill.exports.integers import grid, integers
from bitmill.formats.affine import Affine
from bitmill.formats.gguf_types import GGUF_TYPES, SMALL, block_columns, gguf_type
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.quantized import Quantized
from bitmill.formats.signed_scale import SignedTable
from bitmill.formats.super_block_offset import SuperBlockOffset

BLOCK = SMALL
_RANGES = {Type.Q4_0: (-8, 7), Type.Q5_0: (-16, 15), Type.Q8_0: (-128, 127)}  # smallest first


def unsupported_reason(layer: Layer) -> str | None:
    """Return why no block type holds a layer, as the end of a sentence."""
    kind = gguf_type(layer.format)
    if kind is not None:
        width = block_columns(kind)
        whole = layer.shape[1] % width == 0
        return None if whole else f"its {layer.shape[1]} columns are no whole blocks of {width}, which {kind} has"
    if isinstance(layer.format, Microscaling):
        return "of microscaling formats gguf holds e2m1 in groups of 32 alone"
    if isinstance(layer.format, SignedTable | SuperBlockOffset | Affine):
        return f"no type of gguf has these bits and groups; {', '.join(GGUF_TYPES)} exist (--method gguf)"
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
    known = gguf_type(quantized.format)
    if known is not None and known in WRITERS:
        return _rows(WRITERS[known](quantized)), Type[known]
    if isinstance(quantized.format, Microscaling):
        scale = quantized.params["scale"].to(torch.uint8)[..., None]
        return _rows([scale, halves(quantized.codes.unflatten(-1, (-1, BLOCK)))]), Type.MXFP4
    if isinstance(quantized.format, SignedTable):
        assert known is not None
        return _of_codes(
            quantized.codes.unflatten(-1, (-1, BLOCK)), fp16(quantized.params["scale"], 1), Type[known]
        )
    matrix = integers(quantized)
    rows, groups = matrix.scale.shape
    values = matrix.codes.view(rows, groups, -1).to(torch.int16) - matrix.zero[..., None].to(torch.int16)
    low, high = int(values.min()), int(values.max())
    kind = next(kind for kind, (least, most) in _RANGES.items() if least <= low and high <= most)
    repeats = values.shape[-1] // BLOCK
    d = matrix.scale.repeat_interleave(repeats, 1).contiguous().view(torch.uint8).view(rows, -1, 2)
    return _of_codes((values.reshape(rows, -1, BLOCK) - _RANGES[kind][0]).to(torch.uint8), d, kind)


def _of_codes(codes: Tensor, d: Tensor, kind: Type) -> tuple[np.ndarray, Type]:
    """Return blocks of codes uint8 (rows, blocks, 32) and their scales (rows, blocks, 2 bytes), and the type."""
    if kind is Type.Q8_0:
        return _rows([d, codes ^ 128]), kind  # as signed bytes
    if kind is not Type.Q5_0:
        return _rows([d, halves(codes)]), kind
    fifth = np.packbits((codes >> 4).numpy(), axis=-1, bitorder="little")
    return _rows([d, torch.from_numpy(fifth), halves(codes & 15)]), kind


def _rows(parts: list[Tensor]) -> np.ndarray:
    """Return blocks (rows, blocks, bytes), given in parts, as rows of bytes."""
    joined: np.ndarray = torch.cat(parts, -1).flatten(1).contiguous().numpy()
    return joined
