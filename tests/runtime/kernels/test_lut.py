"""The compiled kernels: every instruction set against fp64 within the stated bound, and the buffers of a layer."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitmill import native
from bitmill.errors import RecipeError, UsageError
from bitmill.formats import FORMATS, Lookup, ScalarFormat
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.codebook import Codebook
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.runtime import ops
from bitmill.runtime.activations import ACTIVATIONS, activations
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.compiled import MAX_TOKENS
from bitmill.runtime.kernels.lut import Lut
from bitmill.runtime.kernels.lut_tables import (
    BANK,
    OWN,
    are_sums,
    as_integers,
    group_blocks,
    lookup_tables,
    rounded,
)
from bitmill.runtime.kernels.reference import Reference
from bitmill.runtime.modules.linear import QuantLinear
from helpers.cases import few_formats
from helpers.native_kernels import CPU, ISAS, needs_native, quantized
from helpers.selection import thin

pytestmark = needs_native
SCALAR = [f for f in few_formats() if isinstance(f, ScalarFormat)]
WIDTHS = {
    "uniform": 8,
    "codebook": 8,
    "binary_coding": 5,
    "integer_coding": 4,
    "half_integer": 8,
    "normal_float": 4,
}


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, monkeypatch, nan_memory):
    monkeypatch.setenv("BITMILL_KERNEL", "lut")
    library = native.native()
    before = library.isa()
    library.use_isa(request.param)
    yield request.param
    library.use_isa(before)


def check(matrix: Quantized, x: Tensor, act: str) -> None:
    """|y - x W^^T| within the bound of runtime/kernels/lut.py, with the largest input in place of each step's."""
    spec = KernelSpec(matrix.format, matrix.shape, CPU)
    kernel = Lut(spec, matrix.pack())
    y = kernel.apply(x).double()
    W, X = matrix.dequantize().double(), x.double()
    size = X.abs() @ W.abs().T
    if act == "float32":
        bound, slack = 0, 1e-6 * size.max() * x.shape[1] ** 0.5
    else:
        coarse = 254 if act == "int8" and matrix.format.bits <= 4 else 65534
        entry = matrix.format.levels(matrix.params).double().abs().amax((-1, -2)).expand(matrix.shape[0]) / coarse
        step = X.abs().amax(-1, keepdim=True) / (254 if act == "int8" else 65024)
        bound = step * W.abs().sum(1) + (X.abs() + step).sum(-1, keepdim=True) * entry
        slack = (2e-3 if act == "int8" else 2e-5) * size  # fp16 scales; fp32 sums
    assert y.shape == (x.shape[0], matrix.shape[0])
    assert bool(((y - X @ W.T).abs() <= bound * 1.001 + slack + 1e-6).all())


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("format", SCALAR, ids=repr)
@pytest.mark.parametrize("shape", thin([(1, 1), (3, 7), (35, 130), (18, 577)], [(3, 7), (18, 577)]), ids=str)
def test_format_error_bound(format, shape, act, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", act)
    check(quantized(format, shape), torch.randn(2, shape[1]), act)


@given(data=st.data())
def test_random_shapes(data):
    name = data.draw(st.sampled_from(sorted(WIDTHS)))
    low = 2 if name == "normal_float" else 1
    bits = data.draw(st.integers(low, WIDTHS[name]))
    size = data.draw(st.sampled_from([16, 24, 32, 64, 100, 128, 256, "row", "tensor"]))
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300)))
    tokens = data.draw(st.integers(1, 6))
    act = data.draw(st.sampled_from(ACTIVATIONS))
    matrix = quantized(FORMATS.get(name)(bits=bits, group_size=size), shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITMILL_ACTIVATIONS", act)
        check(matrix, torch.randn(tokens, shape[1]), act)


def test_typical_error(monkeypatch):
    x = torch.randn(4, 512)
    for format in (Uniform(3, 64), Codebook(3), BinaryCoding(4, 64), Uniform(8, 64)):
        matrix = quantized(format, (64, 512))
        expected = x @ matrix.dequantize().T
        for act, share in (("int8", 1.5e-2), ("int16", 1e-4), ("float32", 1e-6)):
            monkeypatch.setenv("BITMILL_ACTIVATIONS", act)
            y = Lut(KernelSpec(format, matrix.shape, CPU), matrix.pack()).apply(x)
            assert (y - expected).norm() <= share * expected.norm()


@pytest.mark.parametrize("format", SCALAR, ids=repr)
def test_many_tokens_equal_reference(format, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    matrix, x = quantized(format, (35, 130)), torch.randn(MAX_TOKENS + 1, 130)
    spec = KernelSpec(format, matrix.shape, CPU)
    assert torch.equal(Lut(spec, matrix.pack()).apply(x), Reference(spec, matrix.pack()).apply(x))


def test_tokens_are_independent():
    kernel = Lut(KernelSpec(Uniform(4, 64), (40, 300), CPU), quantized(Uniform(4, 64), (40, 300)).pack())
    x = torch.randn(7, 300)
    assert torch.allclose(kernel.apply(x), torch.cat([kernel.apply(row[None]) for row in x]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_propagate(bad):
    x = torch.randn(2, 96)
    x[1, 50] = bad
    y = Lut(KernelSpec(Uniform(4, 32), (20, 96), CPU), quantized(Uniform(4, 32), (20, 96)).pack()).apply(x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


def test_zero_inputs():
    y = Lut(KernelSpec(Uniform(4, 32), (20, 96), CPU), quantized(Uniform(4, 32), (20, 96)).pack()).apply(
        torch.zeros(1, 96)
    )
    assert torch.equal(y, torch.zeros(1, 20))


# -- the layer ----------------------------------------------------------------------------------------------


def layer_of(matrix: Quantized) -> QuantLinear:
    layer = QuantLinear(matrix.format, matrix.shape, bias=False)
    layer.load_state_dict(matrix.pack())
    return layer


def test_one_layout_in_memory():
    matrix = quantized(Uniform(3, 64), (64, 512))
    layer, packed = layer_of(matrix), matrix.pack()
    x = torch.randn(1, 512)
    y = layer(x)
    held = dict(layer.named_buffers())
    assert "codes" not in held
    assert held["lut_codes"].nbytes == packed["codes"].nbytes
    state = layer.state_dict()
    assert all(torch.equal(state[name], packed[name]) for name in packed)
    assert torch.equal(layer(x), y)
    layer.release_kernel()
    assert torch.equal(layer.codes, packed["codes"])
    assert dict(layer.named_buffers()).keys() == packed.keys()


def test_copy_cast_and_load():
    matrix = quantized(Uniform(3, 64), (20, 130))
    model = nn.Sequential(layer_of(matrix))
    x = torch.randn(1, 130)
    y = model(x)
    other = copy.deepcopy(model)
    other[0].release_kernel()
    other[0].codes.zero_()
    assert torch.equal(model(x), y)
    assert not torch.equal(other(x), y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(model.float()(x), y)


def test_exact_gradients():
    matrix, x = quantized(Uniform(3, 16), (5, 44)), torch.randn(2, 44, requires_grad=True)
    layer_of(matrix)(x).sum().backward()
    assert torch.allclose(x.grad, matrix.dequantize().sum(0).expand(2, 44), atol=1e-5)


def test_torch_operator():
    kernel = Lut(KernelSpec(Uniform(4, 64), (20, 96), CPU), quantized(Uniform(4, 64), (20, 96)).pack())
    arguments = (torch.randn(2, 96), kernel.codes, *kernel.parts, kernel.plan, kernel.zero)
    torch.library.opcheck(ops.lut_linear.op, arguments, test_utils=("test_schema", "test_faketensor"))


# -- choosing -----------------------------------------------------------------------------------------------


def test_kernel_choice(monkeypatch):
    spec = KernelSpec(Uniform(4), (20, 96), CPU)
    monkeypatch.delenv("BITMILL_KERNEL")
    assert choose_kernel(spec) is Lut
    monkeypatch.setenv("BITMILL_KERNEL", "reference")
    assert choose_kernel(spec) is Reference
    monkeypatch.setenv("BITMILL_KERNEL", "nonsense")
    with pytest.raises(RecipeError, match="There is no kernel 'nonsense'"):
        choose_kernel(spec)


def test_unsupported_reason():
    assert (
        Lut.unsupported_reason(KernelSpec(FORMATS.get("e8")(bits=2), (8, 8), CPU))
        == "e8 is no table of single numbers."
    )
    assert "meta" in Lut.unsupported_reason(KernelSpec(Uniform(4), (8, 8), torch.device("meta")))


def test_without_extension(monkeypatch, caplog):
    monkeypatch.delenv("BITMILL_KERNEL")
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "import_error", "for a test")
    native._warn_once.cache_clear()
    matrix, x = quantized(Uniform(4, 32), (20, 96)), torch.randn(1, 96)
    with caplog.at_level(logging.WARNING, logger="bitmill"):
        for _ in range(2):
            assert torch.allclose(layer_of(matrix)(x), x @ matrix.dequantize().T, atol=1e-5)
    assert [record.message for record in caplog.records] == [
        "bitmill runs without its compiled kernels (for a test): quantized models will be slow."
    ]
    with pytest.raises(UsageError, match="without its compiled kernels"):
        native.native()


def test_unknown_values_refused(monkeypatch):
    with pytest.raises(ValueError, match="'avx1024' is not among those of this machine"):
        native.native().use_isa("avx1024")
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "int3")
    with pytest.raises(UsageError, match="BITMILL_ACTIVATIONS is 'int3'"):
        activations()


# -- tables -------------------------------------------------------------------------------------------------


def test_integer_tables_are_exact():
    assert as_integers(torch.tensor([[-1.5, 0, 0.5, 3]]), 255)[1:] == (0.5, 3)
    assert as_integers(torch.tensor([[0.0, 1, 300]]), 255) is None
    assert as_integers(torch.tensor([[0.0, 1 / 3]]), 255) is None


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("half_steps", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_table_rounding_bound(wide, half_steps, size):
    tables = torch.randn(50, 16) * size
    entries, steps, zero = rounded(tables, wide, half_steps)
    assert entries.min() >= 0
    assert entries.max() <= (65535 if wide else 255)
    grows = 1.002 if size > 1e-5 and not wide else 4e2 if half_steps else 1
    limit = tables.abs().amax(-1, keepdim=True) / (65534 if wide else 254) * (grows if half_steps else 1)
    assert ((steps * (entries - zero) - tables).abs() <= limit * 1.001 + 2.0**-25).all()


@pytest.mark.parametrize("wide", [False, True])
def test_odd_tables(wide):
    tables = torch.randn(50, 8)
    tables = torch.cat([tables, -tables.flip(-1)], -1)
    entries, steps, zero = rounded(tables, wide, False, odd=True)
    assert torch.equal(entries + entries.flip(-1), torch.full((50, 16), 65535.0 if wide else 255.0))
    assert ((steps * (entries - zero) - tables).abs() <= steps * 0.51).all()  # fp32 has 24 bits


def test_half_tables_of_binary_coding():
    kind = KernelSpec(BinaryCoding(4, 128), (16, 512), CPU)
    kernel = Lut(kind, quantized(BinaryCoding(4, 128), (16, 512)).pack())
    assert kernel.tensors["lut_tables"].numel() == 16 * 4 * 8
    assert (
        Lut(
            KernelSpec(BinaryCoding(4, 128, offset=True), (16, 512), CPU),
            quantized(BinaryCoding(4, 128, offset=True), (16, 512)).pack(),
        )
        .tensors["lut_tables"]
        .numel()
        == 16 * 4 * 16
    )


def test_group_blocks():
    assert [group_blocks(width, 16) for width in (1, 16, 17, 32, 64, 577)] == [4, 4, 8, 8, 16, 152]
    assert [group_blocks(width, 4) for width in (1, 32, 64, 65, 128)] == [2, 2, 4, 8, 8]
    assert [group_blocks(width, 1) for width in (1, 64, 513)] == [8, 8, 16]


def test_codings_are_sums():
    bits = torch.arange(16)[:, None] >> torch.arange(4) & 1
    codings = (bits.float() @ torch.tensor([[3.0, -2, 1, 7], [1, 2, 4, 8]]).T).T
    assert are_sums(codings)
    assert not are_sums(torch.cat([codings, codings[:1] ** 2]))


@pytest.mark.parametrize(("most", "source"), [(63, BANK), (64, OWN)])
def test_table_bank_limit(most, source):
    tables = torch.tensor([[0.0, 1, 2, 3], [0, 5, 6, most]])
    lookup = Lookup(tables, torch.ones(2, 1), torch.zeros(1, 1), torch.tensor([[0, 1], [1, 0]]))
    assert lookup_tables(lookup, (2, 64), 32, 2, "bytes").source == source


def test_zeros_between_entries_are_in_the_tables():
    powers = (2.0 ** (-torch.arange(8) / 2)).expand(5, -1)
    lookup = Lookup(powers, torch.ones(5, 1), torch.rand(5, 1), torch.arange(5)[:, None])
    made = lookup_tables(lookup, (5, 40), 40, 3, "words")
    assert made.zeros is None  # as fp16, in units of an entry, they were off by up to 32 entries
