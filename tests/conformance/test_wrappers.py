"""Laws of wrappers (formats around formats), for every registered wrapper."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats import FORMATS
from bitmill.formats.quantized import unpack
from bitmill.recipes.recipe import Recipe
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.solvers import Solver, Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.solvers.beam import BeamSearch
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from helpers.cases import all_wrappers, gram_of, inputs, weights

every_wrapper = pytest.mark.parametrize("format", all_wrappers(), ids=repr)
every_solver = pytest.mark.parametrize("solver", [Nearest(), GPTQ()], ids=["nearest", "gptq"])
SHAPES = [(12, 96), (7, 33), (65, 90)]


def solved(format, solver: Solver, shape=(12, 96)):
    X = inputs(columns=shape[1])
    fisher = torch.rand(shape, generator=torch.Generator().manual_seed(2)).pow(4)
    stats = Statistics(gram_of(X), X.shape[0], fisher=fisher, max_abs=X.abs().amax(0))
    return solve(solver, weights(*shape), stats, format)


@every_wrapper
@every_solver
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solved_equals_stored(format, solver, shape):
    matrix = solved(format, solver, shape)
    tensors = matrix.pack()
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert found == {name: (tuple(size), dtype) for name, (size, dtype) in format.layout(shape).items()}
    assert 8 * sum(t.nbytes for t in tensors.values()) == format.stored_bits(shape)
    assert torch.equal(unpack(format, tensors, shape).dequantize(), matrix.dequantize())
    assert matrix.format == format
    assert matrix.shape == matrix.dequantize().shape == shape


@every_wrapper
@every_solver
def test_output_error_is_small(format, solver):
    W = weights()
    X = inputs()
    assert output_error(W, solved(format, solver, (6, 96)).dequantize(), gram_of(X)) < 0.5


@every_wrapper
@every_solver
def test_solving_is_deterministic(format, solver):
    first, second = solved(format, solver).pack(), solved(format, solver).pack()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_wrapper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_equals_decode_and_matmul(format, shape, dtype, nan_memory):
    matrix = solved(format, Nearest(), shape)
    spec = KernelSpec(format, shape, torch.device("cpu"))
    x = torch.randn(2, 5, shape[1]).to(dtype)
    y = choose_kernel(spec)(spec, matrix.pack()).apply(x)
    expected = matrix.effective_inputs(x).double() @ matrix.dequantize().double().T
    assert y.dtype == dtype
    assert y.shape == (2, 5, shape[0])
    assert (y.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()
    layer = QuantLinear(format, shape, bias=False)
    layer.load_state_dict(matrix.pack())
    assert torch.equal(layer(x), y)


@every_wrapper
def test_dict_round_trip(format):
    assert FORMATS.from_dict(json.loads(json.dumps(format.to_dict()))) == format
    solver = BeamSearch() if format.shared else GPTQ()
    assert Recipe.from_yaml(Recipe("test", format, solver).to_yaml()).weight == format


@every_wrapper
def test_nested_wrappers(format):
    try:
        nested = replace(format, inner=format)
    except RecipeError:  # a format that refuses to be nested says why
        return
    if len(set(part_names(nested))) == len(part_names(nested)):
        assert torch.isfinite(solved(nested, Nearest()).dequantize()).all()


def part_names(format) -> list[str]:
    return [part.name for part in format.parts((12, 96))]
