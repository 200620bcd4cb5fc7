"""A skeleton holds only what is in use, and computes what the model computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import tiny_model
from torch import nn

from bitmill.errors import NumericsError, SourceError
from bitmill.models.adapter import ADAPTERS
from bitmill.models.calls import answers_of
from bitmill.models.module import ModuleSource
from bitmill.models.skeleton import Skeleton
from bitmill.models.source import open_source

TOKENS = torch.arange(24).view(2, 12) + 3


def held(skeleton: Skeleton) -> set[str]:
    return {n for n, p in skeleton.model.named_parameters() if not p.is_meta}


@torch.no_grad()
def block_by_block(skeleton: Skeleton) -> torch.Tensor:
    with skeleton.outside():
        hidden, calls = skeleton.enter(TOKENS)
        for index in range(len(skeleton.blocks)):
            block = skeleton.load_block(index)
            hidden = calls[index].run(block, hidden)
            skeleton.free_block(index)
        return skeleton.leave(TOKENS, hidden)


@pytest.mark.parametrize("name", ADAPTERS.names())
@torch.no_grad()
def test_block_by_block_equals_the_whole_model(name):
    model = tiny_model(name)
    logits = block_by_block(Skeleton(ModuleSource(model)))
    assert torch.allclose(logits, answers_of(model)(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@torch.no_grad()
def test_a_folder_gives_the_same(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    logits = block_by_block(Skeleton(open_source(tmp_path)))
    assert torch.allclose(logits, answers_of(model)(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if adapter.head])
@torch.no_grad()
def test_the_table_of_embeddings_and_the_head_are_not_held_together(name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    skeleton = Skeleton(ModuleSource(model))
    table, head = (f"{path}.weight" for path in (skeleton.adapter.embeddings[0], skeleton.adapter.head))
    with skeleton.outside("before"):
        assert table in held(skeleton)
        assert tied or head not in held(skeleton)
        hidden, calls = skeleton.enter(TOKENS)
    assert not held(skeleton)
    for index, call in enumerate(calls):
        hidden = call.run(skeleton.load_block(index), hidden)
        skeleton.free_block(index)
    with skeleton.outside("after"):
        assert (table in held(skeleton)) == tied
        logits = skeleton.leave(TOKENS, hidden)
    assert torch.allclose(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_damaged_head_is_refused_before_the_blocks():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[1, 2] = float("nan")
    skeleton = Skeleton(ModuleSource(model))
    with pytest.raises(NumericsError, match=r"lm_head\.weight' holds 1 NaN"), skeleton.outside("before"):
        pass


def test_only_what_is_in_use_holds_memory():
    skeleton = Skeleton(ModuleSource(tiny_model("llama")))
    assert not held(skeleton)
    skeleton.load_block(1)
    assert held(skeleton) == set(skeleton.block_tensors(1))
    assert all(n.startswith("model.layers.1.") for n in held(skeleton))
    with skeleton.outside():
        assert held(skeleton) == set(skeleton.block_tensors(1)) | set(skeleton.other_tensors())
    skeleton.free_block(1)
    assert not held(skeleton)


def test_the_tensors_of_blocks_and_the_others_are_all():
    skeleton = Skeleton(ModuleSource(tiny_model("opt")))
    parts = [skeleton.block_tensors(0), skeleton.block_tensors(1), skeleton.other_tensors()]
    assert sorted(itertools.chain(*parts)) == skeleton.names()


def test_the_live_model_is_left_alone():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    skeleton = Skeleton(ModuleSource(model))
    skeleton.load_block(0)
    with torch.no_grad():
        for parameter in skeleton.blocks[0].parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_tensors_stay_tied():
    skeleton = Skeleton(ModuleSource(tiny_model("llama", tie_word_embeddings=True)))
    assert "lm_head.weight" not in skeleton.names()
    with skeleton.outside():
        assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
        skeleton.set("model.embed_tokens.weight", torch.ones(128, 32))
        assert (skeleton.model.lm_head.weight == 1).all()
    assert skeleton.model.lm_head.weight.is_meta


@torch.no_grad()
def test_tied_models_run():
    model = tiny_model("llama", tie_word_embeddings=True)
    logits = block_by_block(Skeleton(ModuleSource(model)))
    assert torch.allclose(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_single():
    skeleton = Skeleton(ModuleSource(tiny_model("llama").bfloat16()))
    name = "model.layers.0.mlp.up_proj.weight"
    assert skeleton.dtype(name) == skeleton.stored(name).dtype == torch.bfloat16
    assert skeleton.load_block(0).mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    skeleton = Skeleton(ModuleSource(model))
    skeleton.load_block(0)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight' holds 1 NaN"):
        skeleton.load_block(1)


def test_a_missing_tensor_is_named():
    source = ModuleSource(tiny_model("llama"))
    del source._tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match=r"no tensor .model\.layers\.0\.mlp\.up_proj\.weight"):
        Skeleton(source)


def test_a_tensor_of_another_shape_is_named():
    source = ModuleSource(tiny_model("llama"))
    source._tensors["model.norm.weight"] = torch.ones(31)
    with pytest.raises(SourceError, match=r"'model.norm.weight' has shape \(31,\)"):
        Skeleton(source)


def test_names_without_the_prefix_of_the_base_model_are_understood():
    source = ModuleSource(tiny_model("gpt2"))
    source._tensors = {n.removeprefix("transformer."): t for n, t in source._tensors.items()}
    skeleton = Skeleton(source)
    assert "transformer.h.0.attn.c_attn.weight" in skeleton.names()
    skeleton.load_block(0)


def test_a_module_without_a_config_is_described_by_walking_it():
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
        logits = block_by_block(Skeleton(ModuleSource(net)))
        assert torch.allclose(logits, net(TOKENS), rtol=1e-5, atol=1e-6)
