"""Laws of kernels: apply equals decode and matmul, on every shape and dtype."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats import Format
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.runtime.kernels import Kernel, KernelSpec, choose_kernel
from bitmill.runtime.kernels import reference as reference_module
from bitmill.runtime.kernels.base import KERNELS
from bitmill.runtime.modules.linear import QuantLinear
from helpers.cases import few_formats, fitted, weights
from helpers.selection import thin

SHAPES = [(1, 1), (3, 7), (65, 96), (130, 577)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CPU = torch.device("cpu")
FEW = few_formats()
SERVED = [
    pytest.param(kernel, format, shape, id=f"{shape}-{format!r}-{name}")
    for name, kernel in KERNELS.items()
    for format in FEW
    for shape in SHAPES
    if kernel.unsupported_reason(KernelSpec(format, shape, CPU)) is None
]
KINDS = [pytest.param(kernel, id=name) for name, kernel in KERNELS.items()]
every_kernel = pytest.mark.parametrize("kernel", KINDS)
every_format = pytest.mark.parametrize("format", FEW, ids=repr)
every_served_matrix = pytest.mark.parametrize(("kernel", "format", "shape"), SERVED)

pytestmark = pytest.mark.usefixtures("nan_memory")


@cache
def quantized(format: Format, shape: tuple[int, int]) -> Quantized:
    W = weights(*shape)
    return nearest_matrix(format, W, fitted(format, W, search=False))


def applied(kernel: type[Kernel], matrix: Quantized, x: torch.Tensor) -> torch.Tensor:
    spec = KernelSpec(matrix.format, matrix.shape, CPU)
    reason = kernel.unsupported_reason(spec)
    if reason is not None:
        assert reason.endswith(".")
        pytest.skip(reason)
    return kernel(spec, matrix.pack()).apply(x)


def near(kernel: type[Kernel], y: torch.Tensor, matrix: Quantized, x: torch.Tensor) -> bool:
    expected = x.double() @ matrix.dequantize().double().T
    return bool((y.double() - expected).norm() <= max(1e-5, kernel.tolerance) * expected.norm())


@every_kernel
def test_unsupported_reason(kernel):
    for format in FEW:
        for shape in SHAPES:
            reason = kernel.unsupported_reason(KernelSpec(format, shape, CPU))
            assert reason is None or reason.endswith("."), (format, shape)


@every_served_matrix
def test_equals_decode_and_matmul(kernel, format, shape):
    matrix = quantized(format, shape)
    for dtype, tolerance in TOLERANCE.items():
        x = torch.randn(5, shape[1]).to(dtype)
        y = applied(kernel, matrix, x)
        expected = x.double() @ matrix.dequantize().to(dtype).double().T
        assert y.dtype == dtype
        assert y.shape == (5, shape[0])
        assert (y.double() - expected).norm() <= max(tolerance, kernel.tolerance) * expected.norm()


@every_kernel
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 1, 4)], ids=str)
def test_batch_dimensions(kernel, batch):
    matrix = quantized(Uniform(3, 40), (65, 96))
    x = torch.randn(*batch, 96)
    y = applied(kernel, matrix, x)
    assert y.shape == (*batch, 65)
    assert near(kernel, y, matrix, x)


@every_kernel
def test_noncontiguous_inputs(kernel):
    matrix = quantized(Uniform(4, 40), (65, 96))
    x = torch.randn(96, 6).T
    assert near(kernel, applied(kernel, matrix, x), matrix, x)


@every_kernel
@pytest.mark.parametrize("bits", range(1, 9))
def test_all_bit_widths(kernel, bits):
    matrix = quantized(Uniform(bits, 40), (65, 97))
    x = torch.randn(3, 97)
    assert near(kernel, applied(kernel, matrix, x), matrix, x)


@every_served_matrix
def test_restore_packed_tensors(kernel, format, shape):
    matrix = quantized(format, shape)
    tensors, back = matrix.pack(), kernel(KernelSpec(format, shape, CPU), matrix.pack()).restore()
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@every_kernel
def test_packed_tensors_unmodified(kernel):
    matrix = quantized(Uniform(3, 40), (65, 96))
    tensors = matrix.pack()
    before = {k: v.clone() for k, v in tensors.items()}
    spec = KernelSpec(matrix.format, matrix.shape, CPU)
    if kernel.unsupported_reason(spec) is None:
        kernel(spec, tensors).apply(torch.randn(2, 96))
    assert all(torch.equal(tensors[k], before[k]) for k in before)


@every_format
@pytest.mark.parametrize("tile", thin([1, 96, 700, 1 << 20], [1, 700]))
def test_reference_tile_size(format, tile, monkeypatch):
    matrix, x = quantized(format, (65, 96)), torch.randn(3, 96)
    monkeypatch.setattr(reference_module, "_TILE", tile)
    y = applied(reference_module.Reference, matrix, x)
    assert torch.allclose(y, x @ matrix.dequantize().T, rtol=1e-4, atol=1e-5)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_adds_bias(format, shape, bias):
    matrix = quantized(format, shape)
    layer = QuantLinear(format, shape, bias)
    layer.load_state_dict({**matrix.pack(), **({"bias": torch.randn(shape[0])} if bias else {})})
    for dtype, tolerance in TOLERANCE.items():
        x = torch.randn(2, 3, shape[1]).to(dtype)
        expected = x.double() @ matrix.dequantize().double().T + (layer.bias.double() if bias else 0)
        y = layer(x)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= 2 * tolerance * expected.norm()


def test_kernel_priority(monkeypatch):
    class Picky(Kernel):
        priority = 10**6

        @staticmethod
        def unsupported_reason(spec):
            return None if spec.format.bits == 4 else "it knows 4 bits alone."

        def apply(self, x):
            return x

    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    KERNELS.names()
    monkeypatch.setitem(KERNELS._members, "picky", Picky)
    assert choose_kernel(KernelSpec(Uniform(4), (2, 2), CPU)) is Picky
    assert choose_kernel(KernelSpec(Uniform(3), (2, 2), CPU)) is not Picky
    monkeypatch.setattr(KERNELS, "_members", {"picky": Picky})
    with pytest.raises(RecipeError, match="picky: it knows 4 bits alone"):
        choose_kernel(KernelSpec(Uniform(3), (2, 2), CPU))
