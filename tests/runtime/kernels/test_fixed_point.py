"""Products of many tokens in fixed point: every instruction set against fp64 within the stated bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmill import native
from bitmill.formats.codebook import Codebook
from bitmill.formats.integer_coding import IntegerCoding
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.compiled import MAX_TOKENS
from bitmill.runtime.kernels.lut import Lut
from helpers.cases import few_formats
from helpers.native_kernels import CPU, each_isa, needs_native, quantized  # noqa: F401
from helpers.selection import thin

pytestmark = [needs_native, pytest.mark.usefixtures("each_isa")]
BLOCK = 64


def kernel_of(matrix: Quantized):
    spec = KernelSpec(matrix.format, matrix.shape, CPU)
    return choose_kernel(spec)(spec, matrix.pack())


def bound(x: Tensor, W: Tensor) -> Tensor:
    """Of runtime/kernels/compiled.py, with room for scales in fp16, and for sums in fp32 of codes and of zeros."""
    limit = torch.zeros(len(x), len(W), dtype=torch.float64)
    for first in range(0, x.shape[1], BLOCK):
        X, V = x[:, first : first + BLOCK].abs(), W[:, first : first + BLOCK].abs()
        off_x, off_w = X.amax(1, keepdim=True) / 11584, V.amax(1, keepdim=True) / 11584
        limit += off_x * V.sum(1) + X.sum(1, keepdim=True) * off_w.T + X.shape[1] * off_x * off_w.T
    sums = 2**-20 * x.abs().sum(1, keepdim=True) * W.abs().max()
    return limit + 2**-11 * (x.abs() @ W.abs().T) + sums + 1e-6


@pytest.mark.parametrize("format", few_formats(), ids=repr)
@pytest.mark.parametrize("shape", thin([(1, 1), (3, 7), (35, 130), (18, 577)], [(3, 7), (18, 577)]), ids=str)
def test_format_error_bound(format, shape):
    matrix, x = quantized(format, shape), torch.randn(MAX_TOKENS + 3, shape[1])
    x[1] *= 1e3
    W = matrix.dequantize().double()
    off = (kernel_of(matrix).apply(x).double() - x.double() @ W.T).abs()
    assert bool((off <= bound(x.double(), W)).all())


@given(data=st.data())
def test_random_shapes(data):
    bits = data.draw(st.integers(1, 8))
    size = data.draw(st.sampled_from([16, 24, 32, 64, 96, 100, 128, 256, "row", "tensor"]))
    format = data.draw(
        st.sampled_from([Uniform(bits, size), IntegerCoding(min(bits, 4), size), Codebook(bits, size)])
    )
    shape = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    x = torch.randn(data.draw(st.integers(MAX_TOKENS + 1, 40)), shape[1])
    matrix = quantized(format, shape)
    W = matrix.dequantize().double()
    off = (kernel_of(matrix).apply(x).double() - x.double() @ W.T).abs()
    assert bool((off <= bound(x.double(), W)).all())


@pytest.mark.parametrize("format", [Uniform(4, 64), IntegerCoding(3, 32), Codebook(4), Pyramid(3)], ids=repr)
def test_typical_error(format):
    matrix, x = quantized(format, (64, 512)), torch.randn(40, 512)
    expected = x.double() @ matrix.dequantize().double().T
    assert (kernel_of(matrix).apply(x) - expected).norm() < 3e-4 * expected.norm()


@pytest.mark.parametrize("format", [Uniform(4, 64), Uniform(2, 32), IntegerCoding(3, 32)], ids=repr)
def test_exact_tables(format):
    matrix, x = quantized(format, (64, 512)), torch.randn(40, 512)
    kernel = kernel_of(matrix)
    assert isinstance(kernel, Lut)
    assert kernel.is_exact
    expected = x.double() @ matrix.dequantize().double().T
    assert (kernel.apply(x) - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", [Uniform(4, 32), Codebook(4)], ids=repr)
def test_nonfinite_values_propagate(format, bad):
    x = torch.randn(20, 96)
    x[1, 50] = bad
    y = kernel_of(quantized(format, (20, 96))).apply(x)
    assert torch.isfinite(y[torch.arange(20) != 1]).all()
    assert not torch.isfinite(y[1]).any()


def test_batch_size_does_not_matter():
    kernel, x = kernel_of(quantized(Uniform(4, 64), (40, 300))), torch.randn(45, 300)
    assert torch.equal(kernel.apply(x)[:20], kernel.apply(x[:20]))


def test_dtypes_and_gradients():
    matrix = quantized(Uniform(4, 64), (24, 128))
    kernel, x = kernel_of(matrix), torch.randn(2, 20, 128)
    assert kernel.apply(x.bfloat16()).dtype == torch.bfloat16
    x.requires_grad_()
    kernel.apply(x).sum().backward()
    assert torch.allclose(x.grad[0, 0], matrix.dequantize().sum(0), atol=1e-5)


def test_wrong_shapes_refused():
    inputs = native.native().FixedInputs()
    inputs.read(torch.randn(20, 64), 1)
    for W, y, first in (
        ((8, 63), (20, 8), 0),
        ((8, 64), (19, 8), 0),
        ((8, 64), (20, 8), 1),
        ((8, 64), (20, 8), -1),
    ):
        with pytest.raises(ValueError, match="another shape"):
            inputs.product(torch.randn(W), torch.empty(y), first, 1)
