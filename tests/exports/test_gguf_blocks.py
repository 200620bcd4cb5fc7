"""Block types of GGUF hold matrices to the bit, by the decoder of the package gguf."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from bitmill.exports.base import Layer
from bitmill.exports.gguf_blocks import blocks, unsupported_reason
from bitmill.formats.codebook import Codebook
from bitmill.formats.gguf_types import GGUF_TYPES
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform

SHAPE = (24, 128)


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        (Uniform(bits=4, group_size=32, symmetric=True), Type.Q4_0),
        (Uniform(bits=4, group_size=64, symmetric=True), Type.Q4_0),
        (Uniform(bits=2, group_size=32), Type.Q4_0),
        (Uniform(bits=3, group_size="row"), Type.Q4_0),
        (Uniform(bits=5, group_size=32, symmetric=True), Type.Q5_0),
        (Uniform(bits=6, group_size=32), Type.Q8_0),
        (Uniform(bits=8, group_size=32, symmetric=True), Type.Q8_0),
        (Microscaling(bits=4), Type.MXFP4),
    ],
)
def test_equal_to_the_bit(format, kind):
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    quantized = nearest_matrix(format, W, fit_matrix(format, W, None, search=False))
    assert unsupported_reason(Layer(format, SHAPE)) is None
    data, found = blocks(quantized)
    assert found == kind
    assert np.array_equal(dequantize(data, found), quantized.dequantize().numpy())


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_types(kind):
    """Fits of every type are written as this type; rows that are no whole blocks are refused."""
    format, W = GGUF_TYPES[kind], torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    quantized = nearest_matrix(format, W, fit_matrix(format, W, None, search=True))
    assert unsupported_reason(Layer(format, (32, 512))) is None
    data, found = blocks(quantized)
    assert found.name == kind
    assert quantized.bits_per_weight == 8 * data.size / W.numel()
    assert np.array_equal(dequantize(data, found), quantized.dequantize().numpy())
    assert "no whole blocks" in str(unsupported_reason(Layer(format, (32, 520))))


def test_zeros_take_another_bit():
    """Codes of 4 bits less a zero at an end reach 15."""
    format = Uniform(bits=4, group_size=32)
    W = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) + 1
    quantized = nearest_matrix(format, W, fit_matrix(format, W, None, search=False))
    data, found = blocks(quantized)
    assert found == Type.Q5_0
    assert np.array_equal(dequantize(data, found), quantized.dequantize().numpy())


@pytest.mark.parametrize(
    ("format", "shape", "reason"),
    [
        (Codebook(bits=4), SHAPE, "evenly spaced levels"),
        (Uniform(bits=4, group_size=16), SHAPE, "groups of 16 columns"),
        (Uniform(bits=8, group_size=32), SHAPE, "beyond a byte"),
        (Microscaling(bits=6, element="e3m2"), SHAPE, "e2m1 in groups of 32 alone"),
        (Uniform(bits=4, group_size="row"), (24, 100), "groups of 100 columns"),
    ],
)
def test_refused(format, shape, reason):
    assert reason in unsupported_reason(Layer(format, shape))
