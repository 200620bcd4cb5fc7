"""Helpers of the compiled kernel tests: instruction sets and quantized matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import native
from bitmill.formats import Format
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.runtime.kernels import Kernel, KernelSpec
from helpers.cases import fitted, weights
from helpers.selection import thin

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native._native is None, reason="the compiled kernels are not installed")
ALL_ISAS = native._native.isas() if native._native else []  # csrc/tests/driver.cpp always takes all of them
ISAS = thin(ALL_ISAS, [isa for isa in ALL_ISAS if isa in ("scalar", native.native().isa())]) if ALL_ISAS else []
SHAPES = [(1, 1), (3, 7), (65, 96), (20, 577), (5, 1100)]


@pytest.fixture(params=ISAS)
def each_isa(request, monkeypatch, nan_memory):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    library = native.native()
    before = library.isa()
    library.use_isa(request.param)
    yield
    library.use_isa(before)


def rounded_to(format: Format, W: Tensor) -> Quantized:
    return nearest_matrix(format, W, fitted(format, W, search=False))


def quantized(format: Format, shape: tuple[int, int]) -> Quantized:
    return rounded_to(format, weights(*shape))


def kernel_of(kind: type[Kernel], matrix: Quantized) -> Kernel:
    return kind(KernelSpec(matrix.format, matrix.shape, CPU), matrix.pack())


def exact(matrix: Quantized, x: Tensor) -> Tensor:
    """x W^^T in fp64."""
    return x.double() @ matrix.dequantize().double().T
