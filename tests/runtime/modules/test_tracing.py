"""Packed layers in traces, transforms and compiled graphs compute equal numbers."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.formats.additive import Additive
from bitmill.formats.e8 import E8
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.rotated import Rotated
from bitmill.formats.sum import Sum
from bitmill.formats.uniform import Uniform
from bitmill.runtime.kernels import reference
from bitmill.runtime.modules.embedding import QuantEmbedding, replace_embedding
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.solvers import Statistics
from helpers.cases import weights
from helpers.native_kernels import needs_native, quantized, rounded_to
from helpers.selection import thin

pytestmark = needs_native
SHAPE = (20, 48)
IDS = torch.tensor([[1, 19, 1, 0]])


@pytest.fixture(autouse=True)
def _fastest(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "int16")
    torch._dynamo.reset()


def layer_of(format: Format) -> QuantLinear:
    layer = QuantLinear(format, SHAPE, bias=True)
    layer.load_state_dict({**quantized(format, SHAPE).pack(), "bias": torch.randn(SHAPE[0])})
    return layer


class Doubled(nn.Embedding):
    """A class of its own, as Gemma has."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def table_of(format: Format, kind: type[nn.Embedding] = nn.Embedding) -> QuantEmbedding:
    model = nn.ModuleDict({"table": kind(*SHAPE)})
    table = replace_embedding(model, "table", format)
    table.load_state_dict(quantized(format, SHAPE).pack())
    return table


def exported(layer: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(layer, (x,)).module()


def compiled(layer: nn.Module, x: Tensor) -> nn.Module:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


WAYS = pytest.mark.parametrize("way", [exported, compiled])


@WAYS
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("format", [Uniform(4, 16), Uniform(3), Pyramid(2), E8(2), Additive(2)], ids=repr)
@pytest.mark.parametrize("tokens", thin([1, 32], [1]))
@torch.no_grad()
def test_layers(format, tokens, prepared, way, monkeypatch):
    monkeypatch.setattr(reference, "_TILE", 16 * SHAPE[1])  # two tiles
    layer, x, other = layer_of(format), torch.randn(2, tokens, SHAPE[1])[:1], torch.randn(1, tokens, SHAPE[1])
    if prepared:
        layer(x)
    traced = way(layer, x)
    y = traced(other)
    assert torch.equal(traced(other), y)
    assert (y - layer(other)).norm() <= 5e-3 * y.norm()


@WAYS
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    "format", [Rotated(Uniform(4, 16)), Sum(Uniform(3), outliers=0.2)], ids=["rotated", "sum"]
)
@torch.no_grad()
def test_wrappers(format, prepared, way):
    reduction = format.reduce(weights(*SHAPE), Statistics())
    matrix = reduction.finish(rounded_to(format.inner, reduction.W))
    layer, x = QuantLinear(format, SHAPE, bias=False), torch.randn(1, SHAPE[1])
    layer.load_state_dict(matrix.pack())
    if prepared:
        layer(x)
    y = way(layer, x)(x)
    assert (y - layer(x)).norm() <= 5e-3 * y.norm()


@WAYS
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("format", [Uniform(8, 16), Pyramid(2)], ids=repr)
@torch.no_grad()
def test_tables(format, prepared, way):
    table = table_of(format)
    if prepared:
        table.kernel_on(torch.device("cpu"))
    traced = way(table, IDS)
    other = IDS.flip(-1) // 2
    assert torch.equal(traced(other), table(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("tokens", [1, 32])
@torch.no_grad()
def test_export_and_vmap(prepared, tokens):
    layer, x, other = layer_of(Uniform(4, 16)), torch.randn(tokens, 48), torch.randn(tokens, 48)
    if prepared:
        layer(x)
    recorded = torch.jit.trace(layer, x, check_trace=False)(other)
    many = torch.randn(3, tokens, 48)
    batched = torch.vmap(layer)(many)
    expected = layer(other)
    assert (recorded - expected).norm() <= 5e-3 * expected.norm()
    assert (batched - torch.stack([layer(x) for x in many])).norm() <= 5e-3 * batched.norm()


@pytest.mark.parametrize("prepared", [True, False])
def test_pickle_embedding_subclass(prepared):
    table, file = table_of(Uniform(4, 16), Doubled), io.BytesIO()
    expected = table(IDS)
    if prepared:
        table.kernel_on(torch.device("cpu"))
    torch.save(table, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is type(table)
    assert torch.equal(again(IDS), expected)
