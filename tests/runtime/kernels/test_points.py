"""Points of the lattice and of pyramids in layouts of their own: every instruction set against fp64, and back."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.e8 import E8
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import Quantized
from bitmill.runtime.kernels import Kernel, KernelSpec, choose_kernel
from bitmill.runtime.kernels.reference import Reference
from bitmill.runtime.kernels.vector import VectorKernel
from bitmill.runtime.kernels.vector_lookup import Lattice, Points
from helpers.cases import weights
from helpers.native_kernels import CPU, SHAPES, each_isa, exact, kernel_of, needs_native, rounded_to  # noqa: F401

pytestmark = [needs_native, pytest.mark.usefixtures("each_isa")]


def obeys(kernel: Kernel, matrix: Quantized, act: str) -> None:
    """Check packing, exact decoding, exact products of many tokens, and the error bound of few tokens."""
    tensors, back = matrix.pack(), kernel.restore()
    assert tensors.keys() == back.keys()
    assert all(torch.equal(tensors[name], back[name]) for name in tensors)
    (rows, columns), decoded = matrix.shape, matrix.dequantize()
    assert torch.equal(torch.cat([kernel.weights(slice(0, 1)), kernel.weights(slice(1, rows))]), decoded)
    some = torch.arange(rows).flip(0)
    assert torch.equal(kernel.rows(some), decoded[some])
    x, many = torch.randn(6, columns), torch.randn(17, columns)
    bound = x.abs().amax(1)[:, None] / (254 if act == "int8" else 65024) * decoded.abs().sum(1)
    slack = 3e-6 * (x.abs() @ decoded.abs().T).max()
    assert bool(((kernel.apply(x) - exact(matrix, x)).abs() <= bound + slack).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITMILL_ACTIVATIONS", "float32")
        assert torch.equal(kernel.apply(many), kernel_of(Reference, matrix).apply(many))


# -- pyramid points laid out anew -----------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["int8", "int16"])
@pytest.mark.parametrize("format", [*(Pyramid(bits) for bits in (2, 3, 4)), Pyramid(3, "tensor")], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_points(format, shape, act, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", act)
    W = weights(*shape)
    W[:, ::40] *= 30  # points with nearly all pulses in one coordinate
    matrix = rounded_to(format, W)
    kernel = kernel_of(Points, matrix)
    assert kernel._fallback is None
    assert len(kernel._parts[4]) > 0
    obeys(kernel, matrix, act)


def test_points_unsupported_reason(monkeypatch):
    def chosen(format):
        return choose_kernel(KernelSpec(format, (20, 577), CPU))

    assert chosen(Pyramid(2)) is Points
    assert chosen(Pyramid(1)) is chosen(Pyramid(2, 32)) is VectorKernel
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    assert chosen(Pyramid(2)) is VectorKernel


def test_unused_numbers_stay_packed():
    tensors = {"codes": torch.full((4, 9), -1, dtype=torch.int32), "scale": torch.ones(4, 1).half()}
    kernel = Points(KernelSpec(Pyramid(4), (4, 64), CPU), tensors)
    assert kernel._fallback is not None
    assert torch.equal(kernel.restore()["codes"], tensors["codes"])
    assert torch.isfinite(kernel.apply(torch.randn(1, 64))).all()
    assert torch.isfinite(kernel.apply(torch.randn(17, 64))).all()


# -- points of the lattice laid out anew ----------------------------------------------------------------------


@pytest.mark.parametrize("act", ["int8", "int16"])
@pytest.mark.parametrize("format", [E8(2), E8(2, "row")], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lattice(format, shape, act, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", act)
    matrix = rounded_to(format, weights(*shape))
    matrix.codes.random_(1 << 16)  # all patterns, signs and shifts
    obeys(kernel_of(Lattice, matrix), matrix, act)


def test_lattice_unsupported_reason(monkeypatch):
    def chosen(format):
        return choose_kernel(KernelSpec(format, (20, 577), CPU))

    assert chosen(E8(2)) is chosen(E8(2, "row")) is Lattice
    assert chosen(E8(2, 40)) is VectorKernel
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    assert chosen(E8(2)) is VectorKernel
