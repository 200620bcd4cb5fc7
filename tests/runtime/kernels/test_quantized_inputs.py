"""Integers of inputs and weights multiply exactly: products equal integer arithmetic with the scales behind it."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.lut import Lut
from bitmill.runtime.native import is_available
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import weights

pytestmark = pytest.mark.skipif(not is_available(), reason="the kernels are not compiled")
INPUTS = {
    "token": Uniform(8, "row", symmetric=True),
    "asymmetric": Uniform(8, "row"),
    "4 bits": Uniform(4, "row"),
    "columns": Uniform(8, 64),
    "tensor": Uniform(8, "tensor"),
}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.delenv("BITMILL_ACTIVATIONS", raising=False)


def made(format, columns: int = 200):
    solved = solve(Nearest(), weights(24, columns), Statistics(), format)
    spec = KernelSpec(format, solved.shape, torch.device("cpu"))
    return solved, choose_kernel(spec)(spec, solved.pack())


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", ["row", 64])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 130])
def test_equals_rounded_inputs_times_decoded_weights(inputs, bits, group, tokens):
    solved, kernel = made(QuantizedInputs(Uniform(bits, group), INPUTS[inputs]))
    assert isinstance(kernel.inner, Lut)
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(tokens))
    expected = solved.effective_inputs(x).double() @ solved.dequantize().double().T
    assert (kernel.apply(x) - expected).norm() <= 3e-6 * expected.norm()


def test_columns_above_a_threshold_are_not_rounded():
    format = QuantizedInputs(Uniform(8, "row", symmetric=True), INPUTS["token"], threshold=6.0)
    solved, kernel = made(format)
    x = torch.randn(40, 200)
    x[:, 7] *= 30
    expected = solved.effective_inputs(x) @ solved.dequantize().T
    assert (kernel.apply(x) - expected).norm() <= 1e-4 * expected.norm()


def test_tokens_with_nan_or_inf():
    _, kernel = made(QuantizedInputs(Uniform(8, "row"), INPUTS["asymmetric"]))
    x = torch.randn(20, 200)
    x[3, 5], x[4, 6] = torch.nan, -torch.inf
    y = kernel.apply(x)
    assert y.isnan().all(1).nonzero()[:, 0].tolist() == [3, 4]
    whole = [i for i in range(20) if i not in (3, 4)]
    assert torch.equal(y[whole], kernel.apply(x[whole]))
