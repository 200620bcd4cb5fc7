"""Inputs on a logarithmic scale multiply as integers of several bytes, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitmill.formats.logarithm import AdaLog, Log2, LogSqrt2
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.runtime.kernels.base import KernelSpec, choose_kernel

FORMATS = [AdaLog(4, "tensor"), AdaLog(3, "tensor"), Log2(4, "tensor"), LogSqrt2(3, "tensor")]
GELU = torch.nn.functional.gelu(torch.randn(9, 64, generator=torch.Generator().manual_seed(3)) * 2)


def parameters(format, q: int = 50):
    params = {"scale": torch.tensor([[2.5]]), "zero": torch.tensor([[0.0680]]), "base": torch.tensor([[float(q)]])}
    return {part.name: part.unpack(part.pack(params[part.name])) for part in format.parts((1, 64))}


@pytest.mark.parametrize("format", [*FORMATS, AdaLog(8, "tensor"), AdaLog(4, "row")], ids=repr)
@pytest.mark.parametrize("q", [1, 19, 50, 137])
def test_digits_are_the_formula_exactly(format, q):
    """Multiplier and shift of every code, in Python's integers of any size."""
    params = parameters(format, q)
    codes = torch.arange(1 << format.bits)[None]
    digits, scale, zero = format.integer_digits(codes, params)
    multiplier, shift = (table[0, 0].tolist() for table in format.integer_tables(params))
    longest = max(shift)
    found = sum(part[0].numpy().astype(object) * 256**k for k, part in enumerate(digits))
    assert list(found) == [m << (longest - e) for m, e in zip(multiplier, shift)]
    levels = scale.double() * (torch.tensor(found.astype(np.float64)) - zero.double())
    assert torch.allclose(levels.float(), format.levels(params)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_products_are_sums_of_integers(format):
    """They equal sums in 64 bits, with scale and zero behind them, up to the rounding of the last additions."""
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(4))
    inner, params = Uniform(4, "row"), parameters(format)
    whole = QuantizedInputs(inner, format, static=True)
    fitted = fit_matrix(inner, W, None, search=False)
    matrix = nearest_matrix(inner, W, fitted)
    stored = {**matrix.params, **{f"input_{name}": value for name, value in params.items()}}
    quantized = Quantized(whole, matrix.codes, stored, (24, 64))
    spec = KernelSpec(whole, (24, 64), torch.device("cpu"))
    kernel = choose_kernel(spec)(spec, quantized.pack())
    assert whole.multiplies_integers
    y = kernel.apply(GELU)
    inputs = nearest_matrix(format, GELU, params)
    multiplier, shift = (table[0, 0] for table in format.integer_tables(params))
    integers = (multiplier << (shift.max() - shift))[inputs.codes.long()]
    weights = matrix.codes.long() - matrix.params["zero"].long()
    sums = (integers @ weights.T).double()
    unit = format.multiplier * 2.0 ** int(shift.max())
    zeros = float(params["zero"]) * unit * weights.sum(1).double()
    expected = float(params["scale"]) / unit * (sums - zeros) * matrix.params["scale"].T.double()
    assert float((y - expected).norm() / expected.norm()) < 1e-6
    assert torch.allclose(y, inputs.dequantize() @ matrix.dequantize().T, rtol=1e-5, atol=1e-5)
