"""The trial of the first block finds models that would not run packed."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import transformers
from torch import nn

import bitmill
from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.models.trial import try_block_kinds
from bitmill.sources.module import ModuleSource
from helpers.architectures import MODELS, TOKENS, WINDOWS, model_of


def mamba() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_sound_models_pass(name):
    model = model_of(name)
    streamed = StreamedModel(ModuleSource(model))
    kinds = [type(module) for module in streamed.model.modules()]
    ends = [streamed.adapter.embeddings[0], *filter(None, [streamed.adapter.head])]
    try_block_kinds(streamed, [*(site.layer for site in streamed.all_sites()), *ends])
    assert [type(module) for module in streamed.model.modules()] == kinds
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layer_whose_weight_is_read(method, tmp_path):
    """dt_proj of Mamba, which some releases of transformers read and others call."""
    model, out = mamba(), tmp_path / "out"
    with suppress(SourceError):
        bitmill.quantize(model, method, bits=8, out=tmp_path / "all", calib=WINDOWS, measure=0)
    for folder in tmp_path.iterdir():  # quantized and not refused
        bitmill.load(folder)(TOKENS)
    rules = ["*.mixer.dt_proj=float"]
    bitmill.quantize(model, method, bits=8, out=out, calib=WINDOWS, measure=0, rules=rules)
    with torch.no_grad():
        packed, right = bitmill.load(out)(TOKENS).logits, model(TOKENS).logits
    assert (packed - right).norm() < 0.2 * right.norm()


def test_float_matrices_are_named():
    """The convolution of Mamba belongs to no linear layer, and the weight of dt_proj is read."""
    found = bitmill.quantize(mamba(), "rtn", bits=8, measure=0).report["float_matrices"]
    assert "*.mixer.conv1d.weight" in found["names"]
    assert 0.01 < found["share"] < 0.3


class Block(nn.Module):
    """A block with one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


class Reads(Block):
    """A block that reads the weight of its linear."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ self.linear.weight.T


class Sees(Block):
    """A block whose tokens see later ones."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states + hidden_states.mean(1, keepdim=True))


class Model(nn.Module):
    """A model of such blocks."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(vocab_size=32)
        self.embed, self.layers = nn.Embedding(32, 8), nn.ModuleList([block(), block()])
        self.head = nn.Linear(8, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_later_tokens_seen():
    with pytest.raises(SourceError, match="reads the tokens to come"):
        try_block_kinds(StreamedModel(ModuleSource(Model(Sees))), [])
    bitmill.quantize(Model(Sees), "rtn", bits=4, measure=0)


def test_weight_read():
    with pytest.raises(SourceError, match=r"reads the weight of .layers.0.linear.*\*\.linear=float"):
        bitmill.quantize(Model(Reads), "rtn", bits=4, measure=0)


class OwnProduct(nn.Linear):
    """The product of nn.Linear, written out, as Falcon has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Grouped(nn.Linear):
    """Another product than that of nn.Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flip(-1))


@pytest.mark.parametrize(("kind", "quantized"), [(OwnProduct, True), (Grouped, False)])
def test_classes_derived_from_linear(kind, quantized):
    class Two(Block):
        def __init__(self) -> None:
            super().__init__()
            self.own = kind(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(self.linear(x))

    model = Model(Two)
    layers = [layer["name"] for layer in bitmill.quantize(model, "rtn", bits=4, measure=0).report["layers"]]
    assert ("layers.0.own" in layers) == quantized
    assert "layers.0.linear" in layers
    model(torch.zeros(1, 3, dtype=torch.int64))
