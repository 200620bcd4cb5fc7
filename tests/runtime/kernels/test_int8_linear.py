"""Products of many tokens in 8 bits: every instruction set equals integer arithmetic in numpy bit by bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmill import native
from bitmill.errors import UsageError
from bitmill.formats import ScalarFormat
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.codebook import Codebook
from bitmill.formats.integer_coding import IntegerCoding
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.runtime.activations import Activations, activations
from bitmill.runtime.kernels import KernelSpec
from bitmill.runtime.kernels.int8_linear import int8_linear
from bitmill.runtime.kernels.lut import Lut
from bitmill.runtime.kernels.lut_tables import SHARED, as_integers, lookup_tables, rounded
from helpers.cases import few_formats
from helpers.native_kernels import CPU, each_isa, needs_native, quantized  # noqa: F401
from helpers.selection import thin

pytestmark = [needs_native, pytest.mark.usefixtures("each_isa")]
WIDTHS = [Uniform(bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8)] + [Codebook(bits) for bits in (4, 5, 6, 7, 8)]
FORMATS = [
    *WIDTHS,
    *(f for f in few_formats() if isinstance(f, ScalarFormat)),
    *(Uniform(4, size) for size in ("row", 20, 128)),
    IntegerCoding(4, 32),
    BinaryCoding(4, 64),
]
INT8 = Activations("int8", "int8")


def kernel_of(matrix: Quantized, setting: Activations = INT8) -> Lut:
    kernel = Lut(KernelSpec(matrix.format, matrix.shape, CPU), matrix.pack())
    kernel.activations = setting
    return kernel


class Integers:
    """W^ as csrc/lut/panel-inl.h multiplies it: entries (rows, columns), sizes and offsets (rows, groups)."""

    def __init__(self, matrix: Quantized) -> None:
        format, (rows, columns) = matrix.format, matrix.shape
        self.group = min(format.width(matrix.shape), columns)
        groups = -(-columns // self.group)
        found = format.lookup(format.unpack_params(matrix.pack(), matrix.shape))
        made = lookup_tables(found, matrix.shape, self.group, format.bits, "bytes")
        tables = found.tables[None] if found.table is None else found.tables[found.table]
        tables = tables if tables.dim() == 3 else tables[None]
        exact = as_integers(found.tables, 255)
        if exact:
            entries = exact[0][None] if found.table is None else exact[0][found.table]
        else:
            entries = rounded(tables, False, groups > 1 and made.source != SHARED, made.mirrored)[0]
        entries = entries.reshape(*tables.shape).expand(rows, groups, -1)
        at = torch.arange(columns) // self.group
        codes = matrix.codes.long()
        self.entries = entries[torch.arange(rows)[:, None], at, codes].long().numpy()

        def each(numbers):  # (tiles, groups, rows of a tile)
            return numbers.transpose(1, 2).flatten(0, 1)[:rows, :groups].float().numpy()

        scales = np.ones((rows, groups), np.float32) if made.scales is None else each(made.scales)
        if made.ids is not None:
            scales = made.powers.numpy()[each(made.ids).astype(int) >> made.bank_bits]
        zeros = np.full((rows, groups), made.zero, np.float32) if made.zeros is None else each(made.zeros)
        self.sizes = made.row_scales.numpy()[:rows, None] * scales
        self.offsets = self.sizes * zeros
        self.stored = made.group_blocks * 64 // made.rows_per_tile
        layout = native.native().Layout(
            rows, columns, self.group, format.bits, made.rows_per_tile, made.group_blocks
        )
        self.padded = layout.code_bytes * 8 // format.bits // (layout.tiles * made.rows_per_tile)

    def spans(self, step: int) -> list[tuple[int, int, int]]:
        """(group, first column, column after the last) of the columns that are multiplied as integers."""
        span = 64
        while self.stored % span or self.padded % span or (0 < step < self.group and step % span):
            span //= 2
        self.span, columns = span, self.entries.shape[1]
        return [
            (first // self.group, at, min(at + span, first + self.group, columns))
            for first in range(0, columns, self.group)
            for at in range(first, min(first + self.group, columns), span)
        ]

    def product(self, codes: np.ndarray, steps: np.ndarray, step: int) -> np.ndarray:
        """csrc/fixed/fixed.h for codes (tokens, columns), with steps (tokens, columns)."""
        fused = native.native().isa() != "scalar"

        def fma(a, b, c):
            return (a.astype(np.float64) * b + c).astype(np.float32) if fused else a * b + c

        total = np.zeros((len(codes), len(self.entries)), np.float32)
        spans = self.spans(step)
        for i, (group, first, last) in enumerate(spans):
            sums = codes[:, first:last].astype(np.int64) @ self.entries[:, first:last].T
            assert np.abs(sums).max(initial=0) < 2**31
            size = steps[:, first, None] * self.sizes[None, :, group]
            total = fma(size, sums.astype(np.float32), total)
            if i == 0 or spans[i - 1][0] != group:
                of_x = np.zeros(len(codes), np.float32)
            of_x = of_x + steps[:, first] * codes[:, first:last].sum(1, dtype=np.int32).astype(np.float32)
            if i + 1 == len(spans) or spans[i + 1][0] != group:
                total = fma(-self.offsets[None, :, group], of_x[:, None], total)
        return total


def rounded_inputs(x: np.ndarray, width: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps (tokens, columns) of inputs, one step for every `width` columns, or fewer of a group."""
    codes, steps = np.zeros(x.shape, np.int8), np.zeros(x.shape, np.float32)
    for first in range(0, x.shape[1], group if width < group else width):
        for at in range(first, min(first + max(group, width), x.shape[1]), width):
            part = slice(at, min(at + width, first + group if width < group else at + width))
            step = np.abs(x[:, part]).max(1, keepdims=True) / np.float32(127)
            codes[:, part] = np.rint(x[:, part] * (np.float32(1) / step))
            steps[:, part] = step
    return codes, steps


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", thin([(3, 7), (35, 130), (18, 577)], [(18, 577)]), ids=str)
def test_equals_integer_arithmetic(format, shape):
    matrix = quantized(format, shape)
    kernel, weight = kernel_of(matrix), Integers(matrix)
    for tokens in (1, 23):
        x = torch.randn(tokens, shape[1])
        weight.spans(0)
        codes, steps = rounded_inputs(x.numpy(), min(weight.span, weight.group), weight.group)
        assert np.array_equal(kernel.gemm(x).numpy(), weight.product(codes, steps, 0))


@pytest.mark.parametrize("step_columns", [16, 64, 192, 2000])
def test_steps_of_columns(step_columns):
    matrix, x = quantized(Uniform(3, 64), (40, 500)), torch.randn(513, 500)
    kernel, weight = kernel_of(matrix, replace(INT8, step_columns=step_columns)), Integers(matrix)
    codes, steps = rounded_inputs(x.numpy(), step_columns, 64)
    assert np.array_equal(kernel.gemm(x).numpy(), weight.product(codes, steps, step_columns))


@pytest.mark.parametrize("format", [Uniform(4, 32), Uniform(8, "row"), Codebook(8), Codebook(3, 64)], ids=repr)
@pytest.mark.parametrize("step_columns", [None, 64])
def test_codes_with_zeros(format, step_columns):
    matrix = quantized(format, (20, 200))
    kernel, weight = kernel_of(matrix), Integers(matrix)
    codes = torch.randint(-128, 128, (21, 200), dtype=torch.int8)
    steps = 1 if step_columns is None else 4
    scales, zeros = torch.rand(21, steps) + 0.1, torch.randint(-128, 128, (21, steps)).float()
    of_columns = scales.repeat_interleave(step_columns or 200, 1)[:, :200]
    expected = weight.product(codes.numpy(), of_columns.numpy(), step_columns or 200)
    found = int8_linear(codes, scales, kernel, step_columns=step_columns)
    assert np.array_equal(found.numpy(), expected)
    x = of_columns * (codes.float() - zeros.repeat_interleave(step_columns or 200, 1)[:, :200])
    W = torch.from_numpy(weight.entries * weight.sizes.repeat(weight.group, 1)[:, :200])
    W = W - torch.from_numpy(weight.offsets.repeat(weight.group, 1)[:, :200])
    expected = x.double() @ W.double().T
    found = int8_linear(codes, scales, kernel, zeros, step_columns)
    assert (found - expected).norm() < 1e-5 * (x.abs().double() @ W.abs().double().T).norm()


def test_error_of_rounding():
    matrix, x = quantized(Uniform(4, 64), (64, 512)), torch.randn(40, 512)
    expected = x.double() @ matrix.dequantize().double().T
    errors = [
        float((kernel_of(matrix, setting).gemm(x) - expected).norm() / expected.norm())
        for setting in (Activations(), INT8, replace(INT8, step_columns=512))
    ]
    assert errors[0] < 1e-3 < errors[1] < errors[2] < 2e-2


def test_default_and_variable(monkeypatch):
    monkeypatch.delenv("BITMILL_ACTIVATIONS", raising=False)
    assert (activations().few, activations().many, activations().name) == (
        "int8",
        "int16",
        "int8, int16 for many tokens",
    )
    for name, words in (("int8", "int8"), ("int16", "int16"), ("float32", "float32")):
        monkeypatch.setenv("BITMILL_ACTIVATIONS", name)
        assert activations() == Activations(name, name)
        assert activations().name == words
    matrix, x = quantized(Codebook(8), (20, 96)), torch.randn(20, 96)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "int8")
    kernel = Lut(KernelSpec(matrix.format, matrix.shape, CPU), matrix.pack())
    assert torch.equal(kernel.apply(x), kernel_of(matrix).gemm(x))
    assert "lut_int8_tables" in kernel.tensors  # counted with the memory of the layer


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_propagate(bad):
    x = torch.randn(20, 96)
    x[1, 50] = bad
    y = kernel_of(quantized(Uniform(4, 32), (20, 96))).gemm(x)
    assert torch.isfinite(y[torch.arange(20) != 1]).all()
    assert not torch.isfinite(y[1]).any()


def test_wrong_arguments_refused():
    kernel = kernel_of(quantized(Uniform(4, 64), (8, 128)))
    codes, scales = torch.zeros(17, 128, dtype=torch.int8), torch.ones(17, 1)
    for arguments, message in (
        ((codes.float(), scales, kernel), "codes are torch.float32"),
        ((codes[:, :64], scales, kernel), r"int8 \(17, 64\)|int8 \(tokens, 128\)"),
        ((codes, torch.ones(17, 2), kernel), "scales are"),
        ((codes, scales, kernel, torch.ones(3, 1)), "zeros are"),
        ((codes, torch.ones(17, 2), kernel, None, 100), "Steps of 100 columns do not fit"),
    ):
        with pytest.raises(UsageError, match=message):
            int8_linear(*arguments)


def test_wrong_shapes_refused():
    panels = kernel_of(quantized(Uniform(4, 64), (8, 128)))._panels()
    for x, y, act, step in (
        ((17, 64), (17, 8), 0, 0),
        ((17, 128), (16, 8), 0, 0),
        ((17, 128), (17, 9), 0, 0),
        ((17, 128), (17, 8), 2, 0),
        ((17, 128), (17, 8), 0, -64),
        ((17, 128), (17, 8), 0, 48),
    ):
        with pytest.raises(ValueError, match=r"another shape|int8 or int16|other columns"):
            panels.product(torch.randn(x), torch.empty(y), act, step, 1)
    codes = torch.zeros(17, 128, dtype=torch.int8)
    for steps, step in (((17, 1), 64), ((16, 2), 64), ((17, 2), 0)):
        with pytest.raises(ValueError, match="steps have another shape"):
            panels.product_of_codes(codes, torch.ones(steps), torch.empty(17, 8), step, 1)
