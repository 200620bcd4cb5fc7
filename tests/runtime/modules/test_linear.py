"""QuantLinear as a module: casts, moves, state dicts, and taking the place of a float layer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitmill.formats import Format
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.runtime.modules.linear import QuantLinear, replace_linear
from helpers.cases import few_formats, fitted, weights

SHAPE = (5, 44)
every_format = pytest.mark.parametrize("format", few_formats(), ids=repr)


def quantized(format: Format, W: Tensor | None = None) -> Quantized:
    W = weights(*SHAPE) if W is None else W
    return nearest_matrix(format, W, fitted(format, W, search=False))


def layer_of(format: Format, bias: bool = True) -> QuantLinear:
    layer = QuantLinear(format, SHAPE, bias)
    layer.load_state_dict({**quantized(format).pack(), **({"bias": torch.randn(5)} if bias else {})})
    return layer


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    alike = all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)
    return one.keys() == other.keys() and alike


@every_format
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.bfloat16().float(),
        lambda m: m.cpu(),
    ],
    ids=["to bfloat16", "half", "double", "to cpu, bfloat16", "there and back", "cpu"],
)
def test_casts_keep_packed_tensors(format, cast):
    layer = layer_of(format)
    before = {k: v.clone() for k, v in layer.packed().items()}
    model = cast(nn.Sequential(nn.Linear(44, 44), layer))
    assert same(model[1].packed(), before)
    dtype = model[0].weight.dtype
    assert model[1].bias.dtype == dtype
    y = model(torch.randn(2, 44, dtype=dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@every_format
def test_meta_device(format):
    layer = QuantLinear(format, SHAPE, True, device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu")
    found = {name: (tuple(t.shape), t.dtype) for name, t in layer.packed().items()}
    assert found == {name: (tuple(size), dtype) for name, (size, dtype) in format.layout(SHAPE).items()}
    other = layer_of(format)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 44)
    assert torch.equal(layer(x), other(x))
    assert all(t.is_meta for t in layer.to("meta").buffers())


@every_format
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(format, bias):
    layer = layer_of(format, bias)
    state = layer.state_dict()
    assert state.keys() == format.layout(SHAPE).keys() | ({"bias"} if bias else set())
    other = QuantLinear(format, SHAPE, bias)
    other.load_state_dict(state)
    x = torch.randn(3, 44)
    assert torch.equal(layer(x), other(x))


def test_copies_are_independent():
    layer = layer_of(Uniform(3, 16))
    layer(torch.randn(1, 44))
    other = copy.deepcopy(layer)
    layer.codes.zero_()
    assert not torch.equal(layer.codes, other.codes)


def test_no_trainable_parameters():
    assert not any(p.requires_grad for p in layer_of(Uniform(3)).parameters())


def test_input_gradients():
    layer, x = layer_of(Uniform(3, 16), bias=False), torch.randn(2, 44, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, quantized(Uniform(3, 16)).dequantize().sum(0).expand(2, 44), atol=1e-5)


def test_repr():
    assert "44 -> 5, Uniform(bits=3" in repr(layer_of(Uniform(3)))


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"inner": inner})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["inner"](x)


@every_format
@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
def test_replaces_float_layer(format, kind):
    old = Conv1D(5, 44) if kind == "Conv1D" else nn.Linear(44, 5, bias=kind == "Linear")
    W = old.weight.data.T.contiguous() if kind == "Conv1D" else old.weight.data
    solved = quantized(format, W)
    model = Model(old)
    new = replace_linear(model, "block.inner", format)
    assert model.block["inner"] is new
    assert (new.in_features, new.out_features) == (44, 5)
    bias = {} if old.bias is None else {"bias": old.bias.data}
    new.load_state_dict({**solved.pack(), **bias})
    x = torch.randn(2, 3, 44)
    expected = x @ solved.dequantize().T + (0 if old.bias is None else old.bias)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_missing_layer_raises():
    with pytest.raises(AttributeError):
        replace_linear(Model(nn.Linear(2, 2)), "block.outer", Uniform(3))


@every_format
def test_saved_after_a_product(format):
    """Tensors of a kernel may share memory, which torch.save refuses."""
    layer, x, file = layer_of(format), torch.randn(3, SHAPE[1]), io.BytesIO()
    expected = layer(x)
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected)
    assert same(loaded.state_dict(), layer.state_dict())
