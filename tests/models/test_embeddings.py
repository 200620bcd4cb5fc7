"""Embedding and head of a model: found or refused, and the embedding as a module."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.schema import head_config
from bitmill.errors import CheckpointError, RecipeError, SourceError
from bitmill.formats import FORMATS
from bitmill.formats.quantized import nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.models.embedding_and_head import EmbeddingAndHead, embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.compose import HEAD_BITS, with_head
from bitmill.recipes.embedding_and_head import SMALL_VOCABULARY
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.recipes.rules import FLOAT, Rule, parse_rule
from bitmill.runtime.modules.embedding import QuantEmbedding, replace_embedding, restore_embedding
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.sources.module import ModuleSource
from helpers.cases import fitted, weights
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).relu())


class Own(nn.Module):
    """A custom module with position embeddings, and a linear after the head that is not the head."""

    def __init__(self, table: nn.Module | None = None, tied: bool = False) -> None:
        super().__init__()
        self.places = nn.Embedding(8, 16)
        self.table = nn.Embedding(20, 16) if table is None else table
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 20)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(20, 16))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[ids]


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_custom_module(tied):
    torch.manual_seed(0)
    model = Own(tied=tied)
    before = model(WINDOWS)
    assert embedding_and_head(StreamedModel(ModuleSource(model))) == EmbeddingAndHead("table", "head", tied)
    bitmill.quantize(model, "rtn", bits=8, head_bits=8, calib=WINDOWS, measure=0)
    assert isinstance(model.table, QuantEmbedding)
    assert isinstance(model.head, QuantLinear)
    assert model.head.tied is (model.table if tied else None)
    assert type(model.places) is nn.Embedding
    after = model(WINDOWS)
    assert 0 < (after - before).norm() < 0.02 * before.norm()


def test_model_without_embedding():
    with pytest.raises(SourceError, match="no token embedding"):
        bitmill.quantize(Own(Bag()), "rtn", head_bits=8, calib=WINDOWS, measure=0)
    assert bitmill.quantize(Own(Bag()), "rtn", calib=WINDOWS, measure=0).summary["head_bytes"] == 0


def test_nonlinear_head_refused():
    model = tiny_model("llama")
    streamed = StreamedModel(ModuleSource(model))
    streamed.model.lm_head = nn.Identity()
    with pytest.raises(SourceError, match="is a Identity"):
        embedding_and_head(streamed)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 7, 9, 16, -8, True, "8", "none", 4.5, [8]])
def test_invalid_bits_refused(bits):
    with pytest.raises(RecipeError, match=r"^head_bits is .*; use 8, 6 or 4, or float to leave"):
        bitmill.quantize("smollm2-135m", "rtn", head_bits=bits, dry_run=True)


def test_head_in_recipe():
    bare = build_recipe("gptq")
    assert "head" not in bare.to_dict()
    assert with_head(bare, None) is bare
    for bits in HEAD_BITS:
        recipe = with_head(bare, bits)
        assert recipe.head == Uniform(bits, 64)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert with_head(recipe, 4).head.bits == 4
        assert with_head(recipe, None) == recipe
    data = {**bare.to_dict(), "head": {"format": "sum", "inner": {"format": "uniform", "bits": 4}}}
    with pytest.raises(RecipeError, match="'sum' decodes whole matrices"):
        Recipe.from_dict(data)


def large_model(**changes):
    """A model whose vocabulary is large enough that its table is packed by default."""
    return StreamedModel(ModuleSource(tiny_model("llama", vocab_size=SMALL_VOCABULARY, **changes)))


def head_formats(streamed, *rules, head=None):
    """The formats outside the blocks, and the note."""
    parsed = tuple(rule if isinstance(rule, Rule) else parse_rule(rule, Uniform(4)) for rule in rules)
    resolved = resolve_recipe(replace(build_recipe("rtn", {"group_size": 16}), rules=parsed, head=head), streamed)
    ends = resolved.ends
    assert resolved.head_layers == (ends.layers if ends else ())
    return {name: format.bits for name, format in resolved.head_formats.items()}, resolved


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
WHOLE = {"format": "sum", "inner": {"format": "uniform", "bits": 4}}  # decodes whole matrices


@pytest.mark.parametrize(
    ("rules", "head", "bits"),
    [
        ([], None, {EMBEDDING: 8, HEAD: 8}),
        ([], FLOAT, {}),
        ([], Uniform(4), {EMBEDDING: 4, HEAD: 4}),
        (["lm_head=float"], None, {EMBEDDING: 8}),
        (["*embed_tokens=float"], None, {HEAD: 8}),
        (["lm_head=float"], Uniform(4), {EMBEDDING: 4}),
        (["lm_head=uniform:bits=6"], None, {EMBEDDING: 8, HEAD: 6}),
        (["lm_head=uniform"], FLOAT, {HEAD: 4}),
        (["lm_head=float", "lm_head*=uniform:bits=6"], None, None),
        (["*=uniform:bits=3"], None, {EMBEDDING: 8, HEAD: 8}),  # the layers of the blocks are meant
        ([Rule("lm_head", FORMATS.from_dict(WHOLE))], None, {EMBEDDING: 8}),
    ],
)
def test_default_and_rules(rules, head, bits):
    if bits is None:
        with pytest.raises(RecipeError, match="decides no layer"):
            head_formats(large_model(), *rules, head=head)
        return
    found, resolved = head_formats(large_model(), *rules, head=head)
    assert found == bits
    assert ("lm_head stays in float" in resolved.note) == any(isinstance(rule, Rule) for rule in rules)
    assert resolve_recipe(resolved.recipe, large_model()).head_formats == resolved.head_formats  # it repeats


def test_tied_matrix_has_both_names():
    streamed = large_model(tie_word_embeddings=True)
    assert head_formats(streamed)[0] == {EMBEDDING: 8}
    for name in (EMBEDDING, HEAD):
        assert head_formats(streamed, f"{name}=float")[0] == {}
        assert head_formats(streamed, f"{name}=uniform:bits=6")[0] == {EMBEDDING: 6}


def test_float_by_default_where_it_cannot_be_packed():
    assert (
        "vocabulary of 128 is too small" in head_formats(StreamedModel(ModuleSource(tiny_model("llama"))))[1].note
    )
    streamed = large_model()
    streamed.model.lm_head = nn.Identity()
    found, resolved = head_formats(streamed)
    assert (found, resolved.ends) == ({}, None)
    assert "is a Identity and no linear layer" in resolved.note


@pytest.mark.parametrize("rules", [["lm_head=float"], ["*embed_tokens=float"], ["lm_head=uniform:bits=4"]])
@torch.no_grad()
def test_one_of_both(rules, tmp_path):
    model = tiny_model("llama", vocab_size=SMALL_VOCABULARY)
    outcome = bitmill.quantize(model, "rtn", bits=8, rules=rules, out=tmp_path / "out", calib=WINDOWS, measure=0)
    packed = bitmill.load(tmp_path / "out")
    kinds = {name: type(packed.get_submodule(name)).__name__ for name in (EMBEDDING, HEAD)}
    assert sum("Quant" not in kind for kind in kinds.values()) == ("float" in rules[0])
    torch.testing.assert_close(packed(WINDOWS).logits, model(WINDOWS).logits, atol=0.3, rtol=0)
    assert outcome.report["head_formats"].keys() == set(outcome.report["ends"].values()) - {"", False}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "stored packed too" in text
    bitmill.quantize(model, "rtn", bits=8, rules=rules, calib=WINDOWS, measure=0)
    assert torch.equal(packed(WINDOWS).logits, model(WINDOWS).logits)


class Scaled(nn.Embedding):
    """An embedding like Gemma's, scaled in the dtype of its weight."""

    factor = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.factor).to(self.weight.dtype)


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("bits", [4, 6, 8])
@torch.no_grad()
def test_embedding_lookup(kind, bits):
    W = weights(50, 44)
    format = Uniform(bits, 16)
    quantized = nearest_matrix(format, W, fitted(format, W))
    model = nn.Sequential(kind(50, 44, padding_idx=1))
    model[0].factor = 2.0
    table = replace_embedding(model, "0", format)
    assert table is model[0]
    assert isinstance(table, kind)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in quantized.pack().items()})
    ids = torch.tensor([[49, 0, 1], [7, 7, 31]])
    expected = quantized.dequantize()[ids] * (2.0 if kind is Scaled else 1.0)
    assert torch.equal(model(ids), expected)
    assert torch.equal(model(ids.int()), expected)
    assert model(ids[:, :0]).shape == (2, 0, 44)
    assert model.bfloat16()(ids).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(model).float()(ids), expected)
    assert "50 x 44, Uniform" in repr(model)
    restored = restore_embedding(model, table, quantized.dequantize())
    assert restored is model[0]
    assert type(restored) is kind
    assert torch.equal(model(ids), expected)
    assert list(model.state_dict()) == ["0.weight"]


@pytest.mark.parametrize(
    "ends",
    [
        3,
        {},
        {"embedding": "a", "head": "b"},
        {"embedding": "x", "head": "", "tied": False},
        {"embedding": "a", "head": "", "tied": True},
        {"embedding": "a", "head": "x", "tied": False},
        {"embedding": "a", "head": None, "tied": True},
        {"embedding": ["a"], "head": "b", "tied": 1},
    ],
)
def test_damaged_description_refused(ends):
    groups = [{"format": {"format": "uniform", "bits": 4}, "layers": ["a", "b"]}]
    with pytest.raises(CheckpointError, match=r"damaged.*'ends'") as caught:
        head_config({"groups": groups, "ends": ends})
    assert "\n" not in str(caught.value)
    assert head_config({"groups": groups}) is None


@pytest.mark.parametrize("names", [["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]])
@torch.no_grad()
def test_tied_matrix_stored_once(names, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, **{name: table.clone() for name in names}}, file, {"format": "pt"})
    summary = bitmill.quantize(tmp_path / "source", "rtn", out=tmp_path / "out", head_bits=8, measure=0).summary
    checkpoint = open_checkpoint(tmp_path / "out")
    outside = sorted(name for name in checkpoint.files if "layers" not in name)
    stored = ["codes", "scale", "weight", "zero"]
    assert outside == [*(f"model.embed_tokens.{part}" for part in stored), "model.norm.weight"]
    assert summary["unquantized_bytes"] == 4 * 32 * 5  # norms
    packed = bitmill.load(tmp_path / "out")
    assert packed.lm_head.tied is packed.model.embed_tokens
    bitmill.quantize(model, "rtn", head_bits=8, calib=WINDOWS, measure=0)
    assert torch.equal(packed(WINDOWS).logits, model(WINDOWS).logits)


def test_replaced_table_keeps_hooks_and_children():
    class Normed(nn.Embedding):
        def __init__(self, *shape: int) -> None:
            super().__init__(*shape)
            self.norm = nn.LayerNorm(shape[1])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.norm(super().forward(ids))

    model = nn.Sequential()
    model.table = Normed(6, 16)
    calls: list[int] = []
    model.table.register_forward_hook(lambda *seen: calls.append(1))
    ids, before = torch.arange(6), model.table.weight.data.clone()
    format = Uniform(8, "row")
    table = replace_embedding(model, "table", format)
    table._buffers.update(nearest_matrix(format, before, fitted(format, before, search=False)).pack())
    assert torch.allclose(model.table(ids), model.table.norm(before), atol=0.1)
    restore_embedding(model, table, before)
    assert torch.equal(model.table(ids), model.table.norm(before))
    assert len(calls) == 2
