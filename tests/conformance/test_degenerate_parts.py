"""Few and many tokens equal decode and matmul for parts that are all zero, all equal, very small or very large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitmill.formats import Format, GroupFormat
from bitmill.formats.quantized import Quantized, nearest_matrix, unpack
from bitmill.runtime.kernels import KernelSpec
from bitmill.runtime.kernels.agreement import disagreement
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import all_wrappers, few_formats, fitted, gram_of, inputs, weights

SHAPE = (35, 130)


def matrix_of(format: Format) -> Quantized:
    W = weights(*SHAPE)
    if isinstance(format, GroupFormat):
        return nearest_matrix(format, W, fitted(format, W, search=False))
    X = inputs(columns=SHAPE[1])
    stats = Statistics(gram_of(X), X.shape[0], fisher=W.square(), max_abs=X.abs().amax(0))
    return solve(Nearest(), W, stats, format)


def changed(matrix: Quantized, change) -> Quantized:
    """Change every part in floats of the core, as stored; parts of one number are changed as a whole."""
    core = {part.name for part in matrix.format.core.parts(matrix.shape) if part.bits is None}
    params = {name: part.clone() for name, part in matrix.params.items()}
    for name in core:
        change(params[name])
    codes, params = matrix.format.unpack(matrix.format.pack(matrix.codes, params, matrix.shape), matrix.shape)
    return replace(matrix, codes=codes, params=params)


def zero_rows(part):
    part[::3] = 0


def zero_groups(part):
    part[:, ::2] = 0


def zeros(part):
    part.zero_()


def equal(part):
    part[...] = part.reshape(part.shape[0], -1)[:, :1].view(-1, *[1] * (part.dim() - 1))


def small(part):
    part *= 2.0**-12


def smallest(part):
    part[...] = part.sign() * 2.0**-24


def large(part):
    part *= 30000 / part.abs().max()


def uneven_rows(part):
    part *= torch.logspace(-5, 2, part.shape[0]).view(-1, *[1] * (part.dim() - 1))


def uneven_groups(part):
    part *= torch.logspace(-5, 2, part.shape[1]).view(1, -1, *[1] * (part.dim() - 2))


@pytest.fixture(params=["int8", "int16"])
def compiled(request, monkeypatch, nan_memory):
    monkeypatch.delenv("BITMILL_KERNEL")
    monkeypatch.setenv("BITMILL_ACTIVATIONS", request.param)


CHANGES = [zero_rows, zero_groups, zeros, equal, small, smallest, large, uneven_rows, uneven_groups]


@pytest.mark.parametrize("format", [*few_formats(), *all_wrappers()], ids=repr)
def test_extreme_parts(format, compiled):
    matrix = matrix_of(format)
    for change in CHANGES:
        each = changed(matrix, change)
        spec = KernelSpec(format, SHAPE, torch.device("cpu"))
        assert disagreement(spec, each.pack(), each.dequantize()) is None, change.__name__


@pytest.mark.parametrize("format", [*few_formats(), *all_wrappers()], ids=repr)
def test_one_code_everywhere(format, compiled):
    matrix = matrix_of(format)
    for code in (0, (1 << format.code_bits) - 1 if format.core.block == 1 else 0):
        each = replace(matrix, codes=torch.full_like(matrix.codes, code))
        each = unpack(format, each.pack(), SHAPE)
        spec = KernelSpec(format, SHAPE, torch.device("cpu"))
        assert disagreement(spec, each.pack(), each.dequantize()) is None, code
