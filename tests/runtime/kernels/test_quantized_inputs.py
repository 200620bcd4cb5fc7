"""Integers of inputs and weights multiply exactly: products equal integer arithmetic with the scales behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitmill.formats.codebook import Codebook
from bitmill.formats.float import Float
from bitmill.formats.outlier_columns import OutlierColumns
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.native import is_available
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.lut import Lut
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import weights

pytestmark = pytest.mark.skipif(not is_available(), reason="the kernels are not compiled")
# Integers are exact; of fp32 sums AVX2 and NEON lose more, as their entries are stored less 128.
FEW = 5e-5
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
    assert (kernel.apply(x) - expected).norm() <= (FEW if tokens <= 16 else 3e-6) * expected.norm()


FLOATS = {
    "fp8": (Float(8, "row"), Float(8, "row"), {}),
    "fp8 in groups": (Float(8, "row"), Float(8, 16), {"search": True}),
    "codebook": (Codebook(4, "row"), Uniform(8, "row", symmetric=True), {"simulated": True}),
    "pyramid": (Uniform(4, 64), Pyramid(4, "row"), {"simulated": True}),
    "groups that do not fit": (Uniform(4, 64), Uniform(8, 24, symmetric=True), {}),
}


@pytest.mark.parametrize("pair", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5, 17, 130])
@pytest.mark.parametrize("setting", ["", "int8", "int16"])
def test_other_inputs_are_rounded_once(pair, tokens, setting, monkeypatch):
    if setting:
        monkeypatch.setenv("BITMILL_ACTIVATIONS", setting)
    weight, inputs, options = FLOATS[pair]
    solved, kernel = made(QuantizedInputs(weight, inputs, **options))
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(tokens))
    expected = solved.effective_inputs(x).double() @ solved.dequantize().double().T
    assert (kernel.apply(x) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("group", ["row", 32, 64])
@pytest.mark.parametrize(
    "inputs",
    [
        Uniform(8, "row", symmetric=True),
        Uniform(8, 64, symmetric=True),
        Uniform(4, "row"),
        Uniform(4, 128),
        Uniform(6, "row", symmetric=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("columns", [7, 200, 576])
def test_few_tokens_are_rounded_by_compiled_code(inputs, group, columns):
    solved, kernel = made(QuantizedInputs(Uniform(4, group), inputs), columns)
    assert kernel.step_linear() is not None
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    x[1] *= 1e-6  # fp16 scales below its normal numbers
    x[2] *= -3e4 / x[2].abs().max()
    x[3] = 0
    x[4, 0] = -2 * x[4].abs().max()  # the code -128
    expected = solved.effective_inputs(x).double() @ solved.dequantize().double().T
    for each in (x, *x.split(1)):
        y, right = kernel.apply(each), expected if len(each) == 5 else expected[(x == each).all(1)]
        assert ((y - right).norm(dim=1) <= FEW * right.norm(dim=1)).all()


def test_static_scale_of_few_tokens():
    format = QuantizedInputs(Uniform(4, 64), Uniform(8, "tensor", symmetric=True), static=True)
    stats = Statistics(max_abs=torch.full((200,), 2.0))
    solved = solve(Nearest(), weights(24, 200), stats, format)
    spec = KernelSpec(format, solved.shape, torch.device("cpu"))
    kernel = choose_kernel(spec)(spec, solved.pack())
    assert kernel.step_linear() is not None
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 2  # beyond the range too
    expected = solved.effective_inputs(x).double() @ solved.dequantize().double().T
    assert (kernel.apply(x) - expected).norm() <= FEW * expected.norm()
    x[1, 3] = torch.nan
    assert kernel.apply(x).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [(Uniform(8, "tensor"), "all tokens of a call"), (Uniform(8, 24, symmetric=True), "no groups")],
    ids=repr,
)
def test_other_inputs_become_codes_in_torch(inputs, reason):
    format = QuantizedInputs(Uniform(4, "row"), inputs, simulated=True)
    assert made(format)[1].step_linear() is None
    assert reason in format.uncompiled_reason(200)


def exact_numbers(columns: int, tokens: int, rows: int = 24):
    """Integers of inputs (tokens, in) and weights (out, in) that span the whole range in every row."""
    rng = np.random.default_rng(columns)
    W, x = rng.integers(-8, 8, (rows, columns)), rng.integers(-90, 165, (tokens, columns))
    W[:, :2], x[:, :2] = (-8, 7), (-90, 165)
    return x, W


@pytest.mark.parametrize("wrap", ["none", "outliers"])
@pytest.mark.parametrize("threshold", [0.0, 400.0])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 200), (5, 577), (16, 64), (33, 200)])
def test_equals_integer_arithmetic(wrap, threshold, tokens, columns):
    x, W = exact_numbers(columns, tokens)
    format = QuantizedInputs(Uniform(4, "row"), Uniform(8, "row"), threshold=threshold)
    if threshold:  # beyond it, in every token or in one
        x[:, 7], x[-1, columns - 1] = 4096, -2048
    stats = Statistics()
    if wrap == "outliers":
        largest = torch.ones(columns)
        largest[[5, 20, 21]] = 10
        stats = Statistics(gram=torch.eye(columns), tokens=tokens, max_abs=largest)
        format = OutlierColumns(format, 3)
        x[:, 20] = 30000
    solved = solve(Nearest(), torch.from_numpy(W).float() / 8, stats, format)
    assert torch.equal(solved.dequantize(), torch.from_numpy(W).float() / 8)
    spec = KernelSpec(format, solved.shape, torch.device("cpu"))
    kernel = choose_kernel(spec)(spec, solved.pack())
    assert kernel.step_linear() is not None
    expected = torch.from_numpy(x @ W.T).double() / 32
    assert torch.equal(kernel.apply(torch.from_numpy(x).float() / 4).double(), expected)


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


@pytest.mark.parametrize(
    ("group", "step", "columns"), [(40, 64, 200), (64, 40, 200), (48, 32, 144), ("row", 24, 200)]
)
@pytest.mark.parametrize("tokens", [1, 33])
def test_scales_that_are_no_groups_multiply_in_floats(group, step, columns, tokens):
    format = QuantizedInputs(Uniform(3, group), Uniform(8, step, symmetric=True), simulated=True)
    solved, kernel = made(format, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    expected = solved.effective_inputs(x).double() @ solved.dequantize().double().T
    assert (kernel.apply(x) - expected).norm() <= 1e-6 * expected.norm()
    assert kernel.step_linear() is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reached", [0.0, 2.0])
@pytest.mark.parametrize("tokens", [3, 40])
def test_inputs_that_calibration_never_reached(tokens, reached, symmetric):
    """A channel that was silent on the calibration text, or all of them; numbers beyond the scale, NaN and Inf."""
    format = QuantizedInputs(Uniform(4, 64), Uniform(8, "tensor", symmetric=symmetric), static=True)
    largest = torch.full((200,), reached)
    largest[:50] = 0
    solved = solve(Nearest(), weights(24, 200), Statistics(max_abs=largest), format)
    spec = KernelSpec(format, solved.shape, torch.device("cpu"))
    kernel = choose_kernel(spec)(spec, solved.pack())
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(0))
    x[0] = 1e30
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    y, expected = kernel.apply(x), solved.effective_inputs(x).double() @ solved.dequantize().double().T
    assert y.isnan().all(1).nonzero()[:, 0].tolist() == [1, 2]
    right = [row for row in range(tokens) if row not in (1, 2)]
    assert torch.isfinite(y[right]).all()
    assert (y[right] - expected[right]).norm() <= FEW * expected[right].norm()


def test_scales_that_fit_groups():
    def fits(group, step, columns):
        return QuantizedInputs(Uniform(4, group), Uniform(8, step)).steps_fit(columns)

    assert all(fits(40, step, 200) for step in ("row", 40, 80, 200))
    assert all(fits("row", step, 200) for step in (16, 64))
    assert fits(40, 64, 50)  # narrower than a step
    assert not fits(40, 64, 200)
    assert not fits(40, 20, 200)
