"""A quantized matrix: decoding, size and splitting by rows."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.quantized import fit_matrix, nearest_matrix, unpack
from helpers.cases import few_formats, fitted, rounded, weights

every_format = pytest.mark.parametrize("format", few_formats(), ids=repr)


@every_format
@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (7, 1), (7, 53)], ids=str)
def test_decodes_in_shape(format, shape):
    W = weights(*shape)
    quantized = nearest_matrix(format, W, fit_matrix(format, W, None, True))
    assert quantized.shape == shape
    assert quantized.codes.dtype == (torch.uint8 if format.code_bits <= 8 else torch.int32)
    assert quantized.codes.is_contiguous()
    assert torch.equal(quantized.dequantize(), rounded(format, W, quantized.params))
    again = unpack(format, quantized.pack(), shape)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    stored = sum(t.nbytes for t in quantized.pack().values())
    assert quantized.bits_per_weight == 8 * stored / W.numel()


@every_format
def test_column_importance(format):
    if format.block > 1:
        pytest.skip("blocks of columns are rounded in the plain metric")
    W, importance = weights(), torch.ones(96)
    importance[3] = 1e6
    params = [fit_matrix(format, W, weight, True) for weight in (None, importance)]
    errors = [(W - nearest_matrix(format, W, p).dequantize())[:, 3].square().sum() for p in params]
    assert errors[1] <= errors[0]


@every_format
def test_split_rows(format):
    W = weights(9)
    whole = nearest_matrix(format, W, fitted(format, W))
    pieces = whole.split([2, 1, 6])
    assert [p.shape for p in pieces] == [(2, 96), (1, 96), (6, 96)]
    assert torch.equal(torch.cat([p.dequantize() for p in pieces]), whole.dequantize())
    for piece in pieces:
        again = unpack(format, piece.pack(), piece.shape)
        assert torch.equal(again.dequantize(), piece.dequantize())
