"""Products of inputs and weights whose levels are squares: exact in integers of 8 bits (exponent 1/2, 4 bits)."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats.power import Power
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.recipes.inputs import parse_inputs
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from helpers.cases import weights


def integers(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """sign(q) q^2 of codes."""
    q = codes.to(torch.int64) - (1 << (bits - 1))
    return q * q.abs()


@pytest.fixture(autouse=True)
def any_kernel(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.delenv("BITMILL_ACTIVATIONS", raising=False)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_of_squares_are_exact(bits, tokens):
    """With scales that are powers of two, outputs are integers times a power of two, bit by bit."""
    rows, columns = 35, 256
    matrix = nearest_matrix(Power(bits, "row"), weights(rows, columns), {"scale": torch.full((rows, 1), 2.0**-3)})
    format = QuantizedInputs(Power(bits, "row"), Power(bits, "row"))
    matrix = Quantized(format, matrix.codes, matrix.params, matrix.shape)
    assert format.multiplies_integers
    x = weights(tokens, columns, seed=1)
    top = ((1 << (bits - 1)) - 1) ** 2 / 4 ** (bits - 1)  # the largest level
    x[:, 0] = (
        top * (x.abs().max() / top).log2().ceil().exp2()
    )  # so that the scale of every token is a power of two
    spec = KernelSpec(format, (rows, columns), torch.device("cpu"))
    y = choose_kernel(spec)(spec, matrix.pack()).apply(x)
    inputs, _ = format.quantize_inputs(x, {})
    scale = inputs.params["scale"]
    assert torch.equal(scale, scale.log2().round().exp2())
    sums = integers(inputs.codes, bits) @ integers(matrix.codes, bits).T
    assert sums.abs().max() < 1 << 24
    assert torch.equal(y, sums.float() * (scale * 2.0**-3 / 16 ** (bits - 1)))


@pytest.mark.parametrize("inner", [Power(4, 64), Uniform(4, 64), Power(3, 64, exponent=0.6)], ids=repr)
@pytest.mark.parametrize("tokens", [2, 40])
def test_kernel_equals_rounded_inputs_times_matrix(inner, tokens):
    format = QuantizedInputs(inner, Power(4, "row"), simulated=True)
    W = weights(70, 256)
    solved = nearest_matrix(inner, W, fit_matrix(inner, W, None, True))
    matrix = Quantized(format, solved.codes, solved.params, solved.shape)
    spec, x = KernelSpec(format, (70, 256), torch.device("cpu")), weights(tokens, 256, seed=2)
    y = choose_kernel(spec)(spec, matrix.pack()).apply(x)
    expected = matrix.effective_inputs(x) @ matrix.dequantize().T
    assert (y - expected).norm() < 2e-2 * expected.norm()


def test_other_exponents_are_simulations():
    """Their levels are no integers, so that products need floats: refused unless simulated."""
    assert (
        Power(4).arithmetic
        == Power(8, exponent=1.0).arithmetic
        == Power(3, exponent=1 / 3).arithmetic
        == "integer"
    )
    for format in (Power(5), Power(4, exponent=0.6), Power(4, per="layer")):
        assert format.arithmetic is None
    recipe = build_recipe("rtn")
    inputs = parse_inputs("power:bits=4")
    assert Recipe("squares", recipe.weight, recipe.solver, inputs=inputs).inputs == inputs
    with pytest.raises(RecipeError, match="simulated=true"):
        Recipe("roots", recipe.weight, recipe.solver, inputs=parse_inputs("power:bits=4,exponent=0.6"))
