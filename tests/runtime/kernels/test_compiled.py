"""Compiled kernels of vector formats, rotations and sparse entries: every instruction set against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmill import native
from bitmill.formats import Wrapper
from bitmill.formats.additive import Additive
from bitmill.formats.e8 import E8
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import Quantized
from bitmill.formats.rotated import Rotated
from bitmill.formats.sum import Sum
from bitmill.formats.trellis import Trellis
from bitmill.formats.uniform import Uniform
from bitmill.numerics.hadamard import hadamard
from bitmill.numerics.rotations import rotation
from bitmill.runtime import ops
from bitmill.runtime.kernels import KernelSpec
from bitmill.runtime.kernels.additive import AdditiveKernel
from bitmill.runtime.kernels.reference import Reference
from bitmill.runtime.kernels.rotated import RotatedKernel
from bitmill.runtime.kernels.rotation_plan import _without_sylvester, rotation_plan
from bitmill.runtime.kernels.sum import SumKernel
from bitmill.runtime.kernels.vector import VectorKernel
from bitmill.runtime.kernels.vector_lookup import Lattice, Points
from bitmill.solvers import Statistics
from helpers.cases import weights
from helpers.native_kernels import CPU, SHAPES, each_isa, exact, kernel_of, needs_native, quantized, rounded_to  # noqa: F401

pytestmark = [needs_native, pytest.mark.usefixtures("each_isa")]
VECTORS = [E8(2), E8(2, 40), *(Pyramid(bits) for bits in range(1, 5)), Pyramid(2, 32), Pyramid(3, "tensor")]
VECTORS += [Trellis(bits, state_bits=8) for bits in range(1, 5)] + [Trellis(2, 64, 10)]


def random_codes(format: Additive, shape: tuple[int, int]) -> Quantized:
    """Random codes and parameters: fitting codebooks takes long, and the kernel does not care."""
    params = {part.name: torch.randn(part.shape).half().float() for part in format.parts(shape)}
    codes = torch.randint(0, 1 << format.bits, (shape[0], format.codes_in(shape[1])), dtype=torch.uint8)
    return Quantized(format, codes, params, shape)


def wrapped(format: Wrapper, shape: tuple[int, int]) -> Quantized:
    """Rounded to nearest, without statistics."""
    reduction = format.reduce(weights(*shape), Statistics())
    return reduction.finish(rounded_to(format.inner, reduction.W))


def off(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max())


# -- sums of codebook vectors ---------------------------------------------------------------------------------


@settings(max_examples=15)
@given(data=st.data())
def test_additive_error_bound(data):
    format = Additive(
        data.draw(st.integers(1, 8)),
        data.draw(st.sampled_from([8, 16, 40, 64, "row", "tensor"])),
        data.draw(st.integers(1, 4)),
    )
    shape = (data.draw(st.integers(1, 140)), data.draw(st.integers(1, 200)))
    matrix, x = random_codes(format, shape), torch.randn(data.draw(st.integers(1, 4)), shape[1])
    y = kernel_of(AdditiveKernel, matrix).apply(x)
    blocks = torch.nn.functional.pad(x, (0, -shape[1] % 8)).unflatten(1, (-1, 8)).double()
    products = torch.einsum("tbi,mki->tbm", blocks.abs(), matrix.params["codebooks"][0, 0].double().abs())
    scale = matrix.params["scale"].double().abs().amax(1).expand(shape[0])
    each = products.amax((1, 2))[:, None] / 8190 * blocks.shape[1] * format.codebooks
    assert bool(((y - exact(matrix, x)).abs() <= each * scale + 1e-4).all())


def test_typical_additive_error():
    matrix, x = random_codes(Additive(8), (70, 577)), torch.randn(3, 577)
    y, expected = kernel_of(AdditiveKernel, matrix).apply(x), exact(matrix, x)
    assert (y - expected).norm() < 1e-3 * expected.norm()


def test_nonfinite_values_propagate():
    x = torch.randn(2, 96)
    x[1, 50] = float("nan")
    y = kernel_of(AdditiveKernel, random_codes(Additive(8), (70, 96))).apply(x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


# -- lattice and pyramid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", VECTORS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vector_kernel_is_exact(format, shape):
    matrix, x = quantized(format, shape), torch.randn(3, shape[1])
    kernel = kernel_of(VectorKernel, matrix)
    decoded = torch.cat([kernel.weights(slice(0, 1)), kernel.weights(slice(1, shape[0]))])
    assert torch.equal(decoded, matrix.dequantize())
    assert off(kernel.apply(x), exact(matrix, x)) < 3e-6


@pytest.mark.parametrize("format", [Additive(5, codebooks=3), E8(2), Pyramid(3)], ids=repr)
def test_many_tokens_equal_reference(format, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    matrix = random_codes(format, (35, 130)) if isinstance(format, Additive) else quantized(format, (35, 130))
    kind = AdditiveKernel if isinstance(format, Additive) else VectorKernel
    x = torch.randn(17, 130)
    assert torch.equal(kernel_of(kind, matrix).apply(x), kernel_of(Reference, matrix).apply(x))


def test_unused_numbers_decode():
    format, shape = Pyramid(4), (4, 64)
    tensors = {"codes": torch.full((4, 9), -1, dtype=torch.int32), "scale": torch.ones(4, 1).half()}
    kernel = VectorKernel(KernelSpec(format, shape, CPU), tensors)
    assert torch.isfinite(kernel.apply(torch.randn(1, 64))).all()


# -- rotations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("kind", "width"),
    [("hadamard", n) for n in (1, 2, 7, 16, 32, 96, 576, 1536, 4096, 44, 52)]
    + [("orthogonal", n) for n in (1, 5, 96, 97, 576)],
)
def test_rotation_equals_torch(kind, width, inverse):
    made = rotation(kind, width, 3)
    plan, x = rotation_plan(made, inverse), torch.randn(3, width)
    before = x.clone()
    y = plan.apply(x)
    dense = (made.inverse if inverse else made.forward)(torch.eye(width)).double()
    assert torch.equal(x, before)
    assert off(y, x.double() @ dense) < 3e-6


def test_fourier_falls_back():
    assert rotation_plan(rotation("hadamard", 2 * 257, 0), False) is None
    matrix, x = wrapped(Rotated(Uniform(4, 32)), (5, 2 * 257)), torch.randn(1, 2 * 257)
    assert off(kernel_of(RotatedKernel, matrix).apply(x), exact(matrix, x)) < 0.03


def test_sylvester_factor():
    H, P = hadamard(8), hadamard(12)
    rest, order = _without_sylvester(torch.kron(P, H) / 96**0.5)
    assert order == 8 * 1
    assert torch.allclose(rest, P / 12**0.5)
    assert _without_sylvester(H / 8**0.5)[1] == 8
    assert _without_sylvester(torch.eye(6))[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("sides", ["both", "in"])
def test_rotated_layers(sides, rescale, dtype, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    format = Rotated(Pyramid(2), "hadamard", 1, sides, rescale)
    W = wrapped(Rotated(Pyramid(2), "hadamard", 1, sides), (24, 96))
    own = {"rescale": (torch.rand(1, 96) + 0.5).half().float()} if rescale else {}
    matrix = Quantized(format, W.codes, {**W.params, **own}, W.shape)
    x = torch.randn(2, 1, 96).to(dtype)
    y = kernel_of(RotatedKernel, matrix).apply(x)
    assert y.dtype == dtype
    assert y.shape == (2, 1, 24)
    assert off(y, exact(matrix, x)) < (1e-2 if dtype == torch.bfloat16 else 3e-6)


# -- sparse entries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("shape", [(6, 7), (65, 96), (20, 577)], ids=str)
def test_sparse_entries_added(shape, tokens, dtype, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    matrix = wrapped(Sum(Pyramid(2), outliers=0.2, sensitive=0.02), shape)
    x = torch.randn(tokens, shape[1]).to(dtype)
    y = kernel_of(SumKernel, matrix).apply(x)
    assert y.dtype == dtype
    assert off(y, exact(matrix, x)) < (2e-2 if dtype == torch.bfloat16 else 3e-6)


def test_column_out_of_range():
    matrix = wrapped(Sum(Uniform(3), outliers=0.2), (6, 7))
    tensors = matrix.pack()
    tensors["sparse_columns"] = tensors["sparse_columns"] + 100
    kernel = SumKernel(KernelSpec(matrix.format, (6, 7), CPU), tensors)
    with pytest.raises(IndexError):
        kernel.apply(torch.randn(1, 7))


# -- operators ------------------------------------------------------------------------------------------------


def test_torch_operators():
    x = torch.randn(2, 96)
    sums = kernel_of(AdditiveKernel, random_codes(Additive(4), (70, 96)))
    vectors = kernel_of(VectorKernel, quantized(E8(2), (5, 96)))
    points = kernel_of(Points, quantized(Pyramid(2), (5, 96)))
    lattice = kernel_of(Lattice, quantized(E8(2), (5, 96)))
    entries = kernel_of(SumKernel, wrapped(Sum(Uniform(3), outliers=0.2), (6, 96)))
    plan = rotation_plan(rotation("hadamard", 96, 0), False)
    for operator, arguments in (
        (ops.additive, (sums.codes, sums._books, sums._scales, sums.layout)),
        (ops.vector_linear, (vectors._parts, vectors._plan)),
        (ops.points.linear, (points._parts, points._plan)),
        (ops.lattice.linear, (lattice._parts, lattice._plan)),
        (ops.rotate, plan.parts),
        (ops.sparse_add, (torch.randn(2, 6), *entries._entries)),
    ):
        torch.library.opcheck(operator.op, (x, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_wrong_arrays_raise():
    library, weights = native.native(), torch.randn(4, 6)
    assert library.dense_linear(weights) is not None
    for wrong in (weights.double(), weights.T):
        with pytest.raises(TypeError):
            library.dense_linear(wrong)
    with pytest.raises(TypeError):
        library.sparse_add(torch.zeros(5), *(torch.zeros(0, dtype=torch.uint8),) * 2, weights, weights, 1)


def test_reference_can_be_selected(monkeypatch):
    monkeypatch.setenv("BITMILL_KERNEL", "reference")
    kernel = kernel_of(RotatedKernel, wrapped(Rotated(Uniform(3)), (6, 96)))
    assert not kernel._compiled
    assert kernel_of(SumKernel, wrapped(Sum(Uniform(3), outliers=0.2), (6, 96)))._entries is None
