"""A streamed model holds only the parts in use, and equals the whole model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bitmill.architectures.adapter import ADAPTERS
from bitmill.errors import NumericsError, SourceError
from bitmill.models.block_call import output_fn
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from bitmill.sources.open import open_source
from helpers.tiny_models import TEXT_ADAPTERS, tiny_model

TOKENS = torch.arange(24).view(2, 12) + 3


def held(streamed: StreamedModel) -> set[str]:
    return {n for n, p in streamed.model.named_parameters() if not p.is_meta}


@torch.no_grad()
def block_by_block(streamed: StreamedModel) -> torch.Tensor:
    with streamed.non_block_weights():
        hidden, calls = streamed.embed(TOKENS)
        for index in range(len(streamed.blocks)):
            block = streamed.load_block(index)
            hidden = calls[index].run(block, hidden)
            streamed.free_block(index)
        return streamed.head(TOKENS, hidden)


@pytest.mark.parametrize("name", TEXT_ADAPTERS)
@torch.no_grad()
def test_blocks_equal_whole_model(name):
    model = tiny_model(name)
    logits = block_by_block(StreamedModel(ModuleSource(model)))
    assert torch.allclose(logits, output_fn(model)(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@torch.no_grad()
def test_folder_equals_module(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    logits = block_by_block(StreamedModel(open_source(tmp_path)))
    assert torch.allclose(logits, output_fn(model)(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for name in TEXT_ADAPTERS if ADAPTERS.get(name).head])
@torch.no_grad()
def test_embedding_and_head_not_together(name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    streamed = StreamedModel(ModuleSource(model))
    table, head = (f"{path}.weight" for path in (streamed.adapter.embeddings[0], streamed.adapter.head))
    with streamed.non_block_weights("embedding"):
        assert table in held(streamed)
        assert tied or head not in held(streamed)
        hidden, calls = streamed.embed(TOKENS)
    assert not held(streamed)
    for index, call in enumerate(calls):
        hidden = call.run(streamed.load_block(index), hidden)
        streamed.free_block(index)
    with streamed.non_block_weights("head"):
        assert (table in held(streamed)) == tied
        logits = streamed.head(TOKENS, hidden)
    assert torch.allclose(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_damaged_head_refused_early():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[1, 2] = float("nan")
    streamed = StreamedModel(ModuleSource(model))
    with (
        pytest.raises(NumericsError, match=r"lm_head\.weight' holds 1 NaN"),
        streamed.non_block_weights("embedding"),
    ):
        pass


def test_sound_head_checked_once(monkeypatch):
    streamed = StreamedModel(ModuleSource(tiny_model("llama")))
    read: list[str] = []
    monkeypatch.setattr(
        streamed._stored,
        "tensor",
        lambda name, tensor=streamed._stored.tensor: (read.append(name), tensor(name))[1],
    )
    for _ in range(2):
        with streamed.non_block_weights("embedding"):
            pass
    assert read.count("lm_head.weight") == 1


def test_only_used_parts_in_memory():
    streamed = StreamedModel(ModuleSource(tiny_model("llama")))
    assert not held(streamed)
    streamed.load_block(1)
    assert held(streamed) == set(streamed.block_tensors(1))
    assert all(n.startswith("model.layers.1.") for n in held(streamed))
    with streamed.non_block_weights():
        assert held(streamed) == set(streamed.block_tensors(1)) | set(streamed.non_block_tensors())
    streamed.free_block(1)
    assert not held(streamed)


def test_tensor_partition():
    streamed = StreamedModel(ModuleSource(tiny_model("opt")))
    parts = [streamed.block_tensors(0), streamed.block_tensors(1), streamed.non_block_tensors()]
    assert sorted(itertools.chain(*parts)) == streamed.names()


def test_live_model_unmodified():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    streamed = StreamedModel(ModuleSource(model))
    streamed.load_block(0)
    with torch.no_grad():
        for parameter in streamed.blocks[0].parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_tensors():
    streamed = StreamedModel(ModuleSource(tiny_model("llama", tie_word_embeddings=True)))
    assert "lm_head.weight" not in streamed.names()
    with streamed.non_block_weights():
        assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
        streamed.set_parameter("model.embed_tokens.weight", torch.ones(128, 32))
        assert (streamed.model.lm_head.weight == 1).all()
    assert streamed.model.lm_head.weight.is_meta


@torch.no_grad()
def test_tied_models_run():
    model = tiny_model("llama", tie_word_embeddings=True)
    logits = block_by_block(StreamedModel(ModuleSource(model)))
    assert torch.allclose(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_half_precision_upcast():
    streamed = StreamedModel(ModuleSource(tiny_model("llama").bfloat16()))
    name = "model.layers.0.mlp.up_proj.weight"
    assert streamed.dtype(name) == streamed.stored_tensor(name).dtype == torch.bfloat16
    assert streamed.load_block(0).mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weight_message(bad):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    streamed = StreamedModel(ModuleSource(model))
    streamed.load_block(0)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight' holds 1 NaN"):
        streamed.load_block(1)


def test_missing_tensor_message():
    source = ModuleSource(tiny_model("llama"))
    del source._tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match=r"no tensor .model\.layers\.0\.mlp\.up_proj\.weight"):
        StreamedModel(source)


def test_wrong_shape_message():
    source = ModuleSource(tiny_model("llama"))
    source._tensors["model.norm.weight"] = torch.ones(31)
    with pytest.raises(SourceError, match=r"'model.norm.weight' has shape \(31,\)"):
        StreamedModel(source)


def test_base_model_prefix():
    source = ModuleSource(tiny_model("gpt2"))
    source._tensors = {n.removeprefix("transformer."): t for n, t in source._tensors.items()}
    source.as_saved = True
    streamed = StreamedModel(source)
    assert "transformer.h.0.attn.c_attn.weight" in streamed.names()
    streamed.load_block(0)


def test_module_without_config():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.inner(x).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(128, 8)
            self.stack = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(8, 5)

        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.stack:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        logits = block_by_block(StreamedModel(ModuleSource(net)))
        assert torch.allclose(logits, net(TOKENS), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_of_windows_of_another_length():
    """An argument with a row for every token is cut by the tokens of its own windows."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, bias):
            return self.inner(x) + bias.view(*x.shape[:2], 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(128, 8)
            self.stack = nn.ModuleList([Block(), Block()])

        def forward(self, tokens):
            x, bias = self.embed(tokens), tokens.flatten().float()
            for block in self.stack:
                x = block(x, bias)
            return x

    streamed = StreamedModel(ModuleSource(Net().eval()))
    with streamed.non_block_weights("embedding"):
        for tokens in (TOKENS, TOKENS[:, :7]):
            _, calls = streamed.embed(tokens)
            for window in range(2):
                assert torch.equal(calls[0].cut(2, window, window + 1).args[0], tokens[window].float())
