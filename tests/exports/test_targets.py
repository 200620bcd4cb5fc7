"""Targets hold the numbers of a folder to the bit, and their tensors are laid out as their readers expect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmill.exports.base import TARGETS, Layer
from bitmill.formats.affine import Affine
from bitmill.formats.codebook import Codebook
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform


def matrix(format, shape=(64, 96)) -> Quantized:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nearest_matrix(format, W, fit_matrix(format, W, None, search=False))


def layer(quantized: Quantized) -> Layer:
    return Layer(quantized.format, quantized.shape)


def held(name: str) -> list[Uniform]:
    bits = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": range(1, 9), "mlx": (2, 3, 4, 5, 6, 8)}[name]
    return [
        Uniform(bits=b, group_size=group, symmetric=symmetric)
        for b in bits
        for group in ((32, 64) if name == "mlx" else (32, "row"))
        for symmetric in (True, False)
    ]


@pytest.mark.parametrize(
    ("name", "format"), [(name, f) for name in ("gptq", "awq", "compressed-tensors", "mlx") for f in held(name)]
)
def test_equal_to_the_bit(name, format):
    target, quantized = TARGETS.get(name)(), matrix(format, (64, 128 if name == "mlx" else 96))
    assert target.unsupported_reason(layer(quantized)) is None
    decoded = target.decode(target.tensors(quantized), layer(quantized))
    assert torch.equal(decoded, quantized.dequantize())


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32).astype(np.uint64)


def test_gptq_layout():
    """Eight inputs a word, the first in the lowest bits; zeros along outputs, less one."""
    quantized = matrix(Uniform(bits=4, group_size=32, symmetric=True))
    tensors = TARGETS.get("gptq")().tensors(quantized)
    qweight, scales = words(tensors["qweight"]), tensors["scales"].float().numpy()
    assert qweight.shape == (96 // 8, 64)
    assert set(words(tensors["qzeros"]).flatten().tolist()) == {0x77777777}
    W = np.empty((96, 64), np.float32)
    for k in range(96):
        W[k] = (((qweight[k // 8] >> np.uint64(4 * (k % 8))) & np.uint64(15)).astype(np.float32) - 8) * scales[
            k // 32
        ]
    assert np.array_equal(W.T, quantized.dequantize().numpy())
    assert tensors["g_idx"].tolist() == [k // 32 for k in range(96)]


def test_awq_layout():
    """Nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    quantized = matrix(Uniform(bits=4, group_size=32))
    tensors = TARGETS.get("awq")().tensors(quantized)
    qweight, qzeros = words(tensors["qweight"]), words(tensors["qzeros"])
    scales, W = tensors["scales"].float().numpy(), np.empty((96, 64), np.float32)
    for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        codes, zeros = ((w >> np.uint64(4 * nibble) & np.uint64(15)).astype(np.float32) for w in (qweight, qzeros))
        W[:, column::8] = (codes - zeros.repeat(32, 0)) * scales.repeat(32, 0)[:, column::8]
    assert np.array_equal(W.T, quantized.dequantize().numpy())


def test_compressed_tensors_layout():
    """Three bits are dense: a code may straddle two words."""
    quantized = matrix(Uniform(bits=3, group_size=32))
    tensors = TARGETS.get("compressed-tensors")().tensors(quantized)
    stream = words(tensors["weight_packed"])
    assert stream.shape == (64, 9)
    assert tensors["weight_shape"].tolist() == [64, 96]
    bits = np.unpackbits(stream.astype(np.uint32).view(np.uint8), axis=1, bitorder="little")
    codes = (bits.reshape(64, 96, 3) * [1, 2, 4]).sum(-1)
    assert np.array_equal(codes, quantized.codes.numpy())


@pytest.mark.parametrize("bits", [3, 4])
def test_mlx_layout(bits):
    """Codes are a dense stream of bits; zeros are biases."""
    for format in (Uniform(bits=bits, group_size=32), Affine(bits=bits, group_size=32)):
        quantized = matrix(format)
        tensors = TARGETS.get("mlx")().tensors(quantized)
        assert tensors["weight"].dtype == torch.uint32
        stream = np.unpackbits(tensors["weight"].numpy().view(np.uint8), axis=1, bitorder="little")
        codes = (stream.reshape(64, 96, bits) * (1 << np.arange(bits))).sum(-1).astype(np.float32)
        scales, biases = (tensors[name].float().numpy().repeat(32, 1) for name in ("scales", "biases"))
        assert np.array_equal(codes * scales + biases, quantized.dequantize().numpy())
    layers = {name: Layer(Uniform(bits=b, group_size=32), (64, 96)) for name, b in (("a", 4), ("b", 4), ("c", 8))}
    described = TARGETS.get("mlx")().config(layers, [])
    assert described == {"bits": 4, "group_size": 32, "mode": "affine"} | {
        "c": {"bits": 8, "group_size": 32, "mode": "affine"}
    }
    reason = TARGETS.get("mlx")().unsupported_reason
    assert "groups of 96" in reason(Layer(Uniform(bits=4, group_size="row"), (64, 96)))
    assert "7 bits" in reason(Layer(Uniform(bits=7, group_size=32), (64, 96)))


def test_w8a8():
    target = TARGETS.get("compressed-tensors")()
    inner = matrix(Uniform(bits=8, group_size="row", symmetric=True))
    format = QuantizedInputs(inner.format, Uniform(bits=8, group_size="row", symmetric=True))
    quantized = replace(inner, format=format)
    assert target.unsupported_reason(layer(quantized)) is None
    tensors = target.tensors(quantized)
    assert tensors["weight"].dtype == torch.int8
    assert torch.equal(target.decode(tensors, layer(quantized)), inner.dequantize())
    config = target.config({"a": layer(quantized)}, [])
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize(
    ("format", "shape", "reason"),
    [
        (Codebook(bits=4), (64, 96), "evenly spaced levels"),
        (Uniform(bits=4, zero="float"), (64, 96), "fractions"),
        (Uniform(bits=4, group_size=64), (64, 96), "whole groups of 64"),
        (Uniform(bits=4, group_size="tensor"), (64, 96), "share a scale"),
    ],
)
def test_refused(name, format, shape, reason):
    assert reason in TARGETS.get(name)().unsupported_reason(Layer(format, shape))


def test_mixed_widths():
    layers = {
        "a": Layer(Uniform(bits=4, group_size=32), (64, 96)),
        "b": Layer(Uniform(bits=8, group_size=32), (64, 96)),
        "c": Layer(Uniform(bits=4, group_size=32), (64, 32)),
    }
    assert "'b' has other bits or groups than 'a'" in TARGETS.get("gptq")().mixed_reason(layers)
    del layers["b"]
    assert TARGETS.get("gptq")().mixed_reason(layers) is None
    layers["b"] = Layer(Uniform(bits=8, group_size=32), (64, 96))
    config = TARGETS.get("compressed-tensors")().config(layers, ["lm_head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["a"], ["c"], ["b"]]
    assert config["ignore"] == ["lm_head"]
