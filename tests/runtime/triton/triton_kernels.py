"""Triton's kernels against fp64 within their stated bounds. Run by test_triton.py, on a GPU or as

    TRITON_INTERPRET=1 python -m pytest tests/runtime/triton/triton_kernels.py

Shapes are small: in the interpreter a kernel takes about a second.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bitmill.formats import FORMATS, GroupFormat, ScalarFormat
from bitmill.formats.float import Float
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.agreement import disagreement
from bitmill.runtime.kernels.reference import Reference
from bitmill.runtime.kernels.triton import Triton
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.triton import available
from bitmill.runtime.triton.codes import multiply_codes
from bitmill.runtime.triton.lut import _factors
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import few_formats, fitted, weights
from helpers.selection import one_of_each, thin

DEVICE = torch.device("cpu" if available.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
Uniform, Codebook, BinaryCoding, IntegerCoding, Additive = (
    FORMATS.get(name) for name in ("uniform", "codebook", "binary_coding", "integer_coding", "additive")
)

SCALAR = [format for format in few_formats() if isinstance(format, ScalarFormat)]

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setenv("BITMILL_KERNEL", "triton")


def quantized(format: GroupFormat, shape: tuple[int, int]) -> Quantized:
    W = weights(*shape)
    return nearest_matrix(format, W, fitted(format, W, search=False))


def spec_of(matrix: Quantized) -> KernelSpec:
    return KernelSpec(matrix.format, matrix.shape, DEVICE)


def kernel_of(matrix: Quantized) -> Triton:
    assert Triton.unsupported_reason(spec_of(matrix)) is None
    return Triton(spec_of(matrix), packed(matrix))


def packed(matrix: Quantized) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in matrix.pack().items()}


def magnitudes(matrix: Quantized) -> Tensor:
    """m of the modules' bounds, (rows, columns)."""
    format, params, shape = matrix.format, matrix.params, matrix.shape
    assert isinstance(format, GroupFormat)
    if isinstance(format, Additive):
        absolute = {"codebooks": params["codebooks"].abs(), "scale": params["scale"].abs()}
        return format.dequantize(matrix.codes, absolute, shape)
    assert isinstance(format, ScalarFormat)
    if isinstance(format, BinaryCoding):
        m = params["alpha"].abs().sum(-1) + (params["beta"].abs() if format.offset else 0)
    else:
        found = format.lookup(params)
        tables = found.tables[None] if found.table is None else found.tables[found.table]
        m = (found.factor() * (tables.abs().amax(-1) + found.zero.abs())).abs()
    if m.shape[1] > 1:
        m = m.repeat_interleave(format.width(shape), 1)[:, : shape[1]]
    return m.expand(shape[0], shape[1])


def check(matrix: Quantized, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(tokens, matrix.shape[1]).to(dtype)
    y = kernel_of(matrix).apply(x.to(DEVICE)).cpu()
    expected = x.double() @ matrix.dequantize().double().T
    share = 2.0**-17 if isinstance(matrix.format, BinaryCoding) else 2.0**-18
    if tokens > 1:
        share = 2.0**-24 * (matrix.shape[1] + 64) + (ROUNDING[dtype] if dtype != torch.float32 else 0)
    bound = share * (x.double().abs() @ magnitudes(matrix).double().T) + 2 * ROUNDING[dtype] * expected.abs()
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("bits", thin(range(1, 9), [3, 8]))
@pytest.mark.parametrize("kind", [Uniform, Codebook], ids=lambda kind: kind.__name__)
def test_lut_gemv(kind, bits):
    check(quantized(kind(bits, 40), (5, 130)), 1)


@pytest.mark.parametrize("bits", thin(range(1, 9), [3, 8]))
@pytest.mark.parametrize("kind", [Uniform, Codebook], ids=lambda kind: kind.__name__)
def test_lut_gemm(kind, bits):
    check(quantized(kind(bits, 40), (5, 130)), 16)


@pytest.mark.parametrize("bits", thin(range(1, 6), [1, 4]))
@pytest.mark.parametrize("tokens", [1, 16])
def test_binary(bits, tokens):
    check(quantized(BinaryCoding(bits, 40, offset=bits % 2 == 0), (5, 130)), tokens)


@pytest.mark.parametrize("bits", thin(range(1, 9), [3, 6, 8]))
@pytest.mark.parametrize("tokens", [1, 16])
def test_additive(bits, tokens):
    check(quantized(Additive(bits, 40 if bits % 2 else "row", codebooks=3 if bits < 5 else 2), (9, 130)), tokens)


@pytest.mark.parametrize("shape", thin([(1, 1), (3, 7), (9, 577), (33, 31)], [(3, 7), (9, 577)]), ids=str)
@pytest.mark.parametrize("tokens", thin([1, 2, 17], [1, 17]))
@pytest.mark.parametrize("format", [Uniform(3, 64), BinaryCoding(2, 64), Additive(8)], ids=repr)
def test_odd_shapes(format, tokens, shape):
    check(quantized(format, shape), tokens)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("format", one_of_each(SCALAR, lambda f: (type(f), f.group_size == "tensor")), ids=repr)
def test_every_scalar_format(format, tokens):
    check(quantized(format, (5, 96)), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "format", [Uniform(4, 32), IntegerCoding(3, 32), BinaryCoding(3, 32), Additive(8)], ids=repr
)
def test_half_precision(format, tokens, dtype):
    check(quantized(format, (5, 96)), tokens, dtype)


def test_long_rows():
    check(quantized(Uniform(2, 128), (2, 4100)), 1)


@pytest.mark.parametrize("format", [Uniform(4, 32), BinaryCoding(2, 32), Additive(8)], ids=repr)
def test_nonfinite_values_propagate(format):
    x = torch.randn(2, 96, device=DEVICE)
    x[1, 50] = float("nan")
    y = kernel_of(quantized(format, (5, 96))).apply(x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("format", [Codebook(3), Additive(8)], ids=repr)
def test_deterministic(format):
    kernel, x = kernel_of(quantized(format, (9, 300))), torch.randn(1, 300, device=DEVICE)
    assert torch.equal(kernel.apply(x), kernel.apply(x))


@pytest.mark.parametrize("format", [Uniform(3, 40), Codebook(5), BinaryCoding(3, 40), Additive(5, 40)], ids=repr)
def test_many_tokens_equal_reference(format):
    matrix = quantized(format, (9, 130))
    kernel, reference = kernel_of(matrix), Reference(spec_of(matrix), packed(matrix))
    x = torch.randn(available.MAX_TOKENS + 1, 130, device=DEVICE)
    assert torch.equal(kernel.apply(x), reference.apply(x))
    x = torch.randn(2, 130, device=DEVICE, requires_grad=True)
    kernel.apply(x).sum().backward()
    assert torch.allclose(x.grad, matrix.dequantize().sum(0).to(DEVICE).expand(2, -1), atol=1e-4)


# -- layers and operators -----------------------------------------------------------------------------------


def layer_of(matrix: Quantized) -> QuantLinear:
    layer = QuantLinear(matrix.format, matrix.shape, bias=False)
    layer.load_state_dict(matrix.pack())
    return layer.to(DEVICE)


@pytest.mark.parametrize(
    "format", [Uniform(3, 40), IntegerCoding(3, 32), Codebook(5), BinaryCoding(3, 40), Additive(5, 40)], ids=repr
)
def test_restore_packed_tensors(format):
    matrix = quantized(format, (5, 130))
    layer, x = layer_of(matrix), torch.randn(1, 130, device=DEVICE)
    y = layer(x)
    assert type(layer.kernel) is Triton
    kept = matrix.pack()
    state = layer.state_dict()
    assert all(torch.equal(state[name].cpu(), kept[name]) for name in kept)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize(
    "format", [Uniform(3, 40), IntegerCoding(3, 32), BinaryCoding(2, 40, offset=True), Additive(5, 40)], ids=repr
)
def test_compile_and_export(format, monkeypatch):
    layer, x = layer_of(quantized(format, (3, 130))), torch.randn(1, 130, device=DEVICE)
    y = layer(x)  # lays the weights out
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), y)
    operator, seen = layer.kernel._family._operator, []
    monkeypatch.setattr(operator, "run", lambda *arguments: seen.append(arguments) or operator.op(*arguments))
    layer(x)
    torch.library.opcheck(operator.op, seen[0], test_utils=("test_schema", "test_faketensor"))
    exported = torch.export.export(nn.Sequential(layer), (x,))
    assert any("triton_" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(x), y)


@triton.jit
def first_entries(out, one, START: tl.constexpr):
    rows, groups = (START + tl.arange(0, 2))[:, None], tl.arange(0, 2)[None, :]
    inside = (rows >= START) & (groups < 2)
    alone: tl.constexpr = (1, 1)
    each: tl.constexpr = (START + 2, 2)
    _, _, table = _factors(one, one, None, None, rows, groups, inside, START + 2, alone, alone, each, 0, 8)
    tl.store(out + (rows - START) * 2 + groups, table)


def test_int64_table_offsets():
    start, out = 1 << 23, torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    first_entries[(1,)](out, torch.ones(1, 1, device=DEVICE), start)
    assert out.flatten().tolist() == [(2 * start + i) << 8 for i in range(4)]


def test_verification_compares_these_kernels(monkeypatch):
    matrix = quantized(Uniform(3, 32), (8, 64))
    assert disagreement(spec_of(matrix), packed(matrix), matrix.dequantize()) is None
    apply = Triton.apply
    monkeypatch.setattr(Triton, "apply", lambda kernel, x: apply(kernel, x) * 1.01)
    assert "1 token" in str(disagreement(spec_of(matrix), packed(matrix), matrix.dequantize()))


@pytest.mark.parametrize(
    ("inputs", "weights_format"),
    [
        (Uniform(8, "row", symmetric=True), Uniform(8, "row", symmetric=True)),
        (Uniform(8, "row"), Uniform(4, 40)),
        (Uniform(4, 32), Uniform(4, 64)),
        (Float(8, "row"), Float(8, "row")),
    ],
    ids=repr,
)
def test_codes_of_many_tokens(inputs, weights_format):
    format = QuantizedInputs(weights_format, inputs)
    matrix = solve(Nearest(), weights(5, 200), Statistics(), format)
    spec = KernelSpec(format, matrix.shape, DEVICE)
    kernel = choose_kernel(spec)(spec, packed(matrix))
    assert isinstance(kernel.inner, Triton)
    x = torch.randn(70, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[3, 5] = torch.nan
    found = kernel._multiply_on_gpu(x)
    assert torch.equal(found.nan_to_num(), kernel.apply(x).nan_to_num())
    assert found.isnan().all(1).nonzero()[:, 0].tolist() == [3]
    x[3] = 1
    expected = matrix.effective_inputs(x.cpu()).double() @ matrix.dequantize().double().T
    assert (kernel.apply(x).cpu() - expected).norm() <= 1e-6 * expected.norm()


def test_integers_of_many_tokens_are_exact():
    x = torch.randint(-128, 128, (65, 130), dtype=torch.int8, device=DEVICE)
    w = torch.randint(-128, 128, (3, 130), dtype=torch.int8, device=DEVICE)
    ones, zeros = torch.ones(65, 1, device=DEVICE), torch.full((65, 1), 3.0, device=DEVICE)
    found = multiply_codes(x, ones, w, ones[:3] / 4, 130, zeros)
    assert torch.equal(found.double(), (x.double() - 3) @ w.double().T / 4)
