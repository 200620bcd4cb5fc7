"""Blocks of GGUF become matrices that decode to the numbers of the package gguf to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from bitmill.errors import SourceError
from bitmill.exports.gguf_blocks import blocks
from bitmill.imports.gguf_blocks import quantized

SCALES = {  # where a block has numbers in fp16
    Type.Q4_0: (0,), Type.Q5_0: (0,), Type.Q8_0: (0,), Type.Q4_1: (0, 2), Type.Q5_1: (0, 2), Type.Q2_K: (80, 82),
    Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.MXFP4: (),
    Type.IQ4_NL: (0,), Type.IQ4_XS: (0,),
}  # fmt: skip


def random_rows(kind: Type) -> np.ndarray:
    rng, size = np.random.default_rng(0), GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (5, 3, size), dtype=np.uint8)
    for place in SCALES.get(kind, ()):
        blocks[:, :, place : place + 2] = rng.standard_normal((5, 3, 1)).astype(np.float16).view(np.uint8)
    if kind is Type.MXFP4:
        blocks[:, :, 0] = rng.integers(100, 140, (5, 3))
    return blocks.reshape(5, -1)


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_equal_to_the_bit(kind):
    rows = random_rows(kind)
    made = quantized(kind, rows)
    assert made.shape == (5, 3 * GGML_QUANT_SIZES[kind][0])
    assert np.array_equal(made.dequantize().numpy(), dequantize(rows, kind))
    codes, params = made.format.unpack(made.pack(), made.shape)
    assert np.array_equal(made.format.dequantize(codes, params, made.shape).numpy(), dequantize(rows, kind))


@pytest.mark.parametrize("kind", set(SCALES) - {Type.Q4_0, Type.Q5_0, Type.Q8_0}, ids=lambda kind: kind.name)
def test_exported_bytes_are_those_imported(kind):
    rows = random_rows(kind)
    data, found = blocks(quantized(kind, rows))
    assert found is kind
    assert np.array_equal(data, rows)


def test_refused():
    with pytest.raises(
        SourceError, match=r"stored as IQ2_S, which no format holds to the bit; IQ4_NL, IQ4_XS, MXFP4"
    ):
        quantized(Type.IQ2_S, random_rows(Type.IQ2_S))
    for kind, size in ((Type.Q4_0, 18), (Type.IQ4_NL, 18), (Type.Q4_K, 144)):
        with pytest.raises(SourceError, match="NaN or infinite"):
            quantized(kind, np.full((2, size), 255, np.uint8))
