"""Recurrent language models equal torch's layers, stream, and run packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.compat import forward_with_cache
from bitmill.evaluation.generate import generate
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.method import build_recipe
from bitmill.recurrent.convert import load_layers
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.sources.module import ModuleSource
from helpers.architectures import TOKENS, WINDOWS
from helpers.tiny_models import tiny_model

CASES = [
    ("lstm_lm", nn.LSTM, {"embedding_size": 24}),
    ("lstm_lm", nn.LSTM, {"embedding_size": 24, "projection_size": 20}),
    ("gru_lm", nn.GRU, {"embedding_size": 24}),
]
WHOLE = {"concat_layers": True, "attention_average": True, "head_bias": True}


@pytest.mark.parametrize(("model_type", "kind", "changes"), CASES)
@torch.no_grad()
def test_equals_torch(model_type, kind, changes):
    model = tiny_model(model_type, **changes)
    projected = {"proj_size": size} if (size := changes.get("projection_size")) else {}
    reference = kind(24, 32, 2, batch_first=True, **projected)
    load_layers(model.model.layers, reference)
    expected = model.lm_head(reference(model.model.embed_tokens(TOKENS))[0])
    assert torch.allclose(model(TOKENS).logits, expected, atol=1e-6)


@pytest.mark.parametrize("model_type", ["lstm_lm", "gru_lm"])
@pytest.mark.parametrize("changes", [{}, WHOLE])
@torch.no_grad()
def test_state_continues(model_type, changes):
    model = tiny_model(model_type, **changes)
    whole = model(TOKENS).logits
    state, parts = None, []
    for part in TOKENS.split([1, 6, 9], 1):
        output, state = forward_with_cache(model, part, state)
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    swapped = state.select(torch.tensor([1, 0]))
    assert torch.equal(swapped.layers[0][0][0], state.layers[0][0][1])


@torch.no_grad()
def test_running_average_is_that_of_every_prefix():
    model = tiny_model("lstm_lm", attention_average=True)
    model.model.average.weight.normal_()
    hidden = torch.randn(1, 7, 32)
    found, _ = model.model.average(hidden)
    for end in range(1, 8):
        shares = (hidden[0, :end] @ model.model.average.weight).softmax(0)
        assert torch.allclose(found[0, end - 1], shares @ hidden[0, :end], atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gru_lm", {"projection_size": 8}),
        ("lstm_lm", {"hidden_size": 0}),
        ("lstm_lm", {"projection_size": 99}),
        ("lstm_lm", {"embedding_size": 24, "tie_word_embeddings": True}),
    ],
)
def test_impossible_sizes_refused(model_type, changes):
    with pytest.raises(Exception, match=r"projection_size|hidden_size|embeddings"):
        tiny_model(model_type, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_size": 24, "projection_size": 24, "tie_word_embeddings": True},
        {**WHOLE, "num_hidden_layers": 1},
    ],
)
@torch.no_grad()
def test_packed_lstm_equals_decoded(changes, tmp_path):
    """Also token by token: kernels of one token are others than those of many."""
    model = tiny_model("lstm_lm", **changes)
    options = {"bits": 2, "head_bits": 4, "group_size": 8}
    bitmill.quantize(model, "gptq", calib=WINDOWS, out=tmp_path / "out", measure=0, **options)
    packed, decoded = bitmill.load(tmp_path / "out"), bitmill.load(tmp_path / "out", dense=True)
    expected = decoded(TOKENS).logits
    assert torch.allclose(packed(TOKENS).logits, expected, atol=1e-4 * float(expected.abs().max()))
    state, steps = None, []
    for token in TOKENS.unbind(1):
        output, state = forward_with_cache(packed, token[:, None], state)
        steps.append(output.logits)
    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-4 * float(expected.abs().max()))
    names = {name for name, module in packed.named_modules() if isinstance(module, QuantLinear)}
    assert {"model.layers.0.input_hidden.f", "model.layers.0.hidden_hidden.o"} <= names
    assert ("model.layers.0.projection" in names) == ("projection_size" in changes)
    assert names <= {*open_checkpoint(tmp_path / "out").formats, "lm_head"}


def test_gates_have_formats_of_their_own(tmp_path):
    rules = ["*.hidden_hidden.f=uniform:bits=8", "*.input_hidden.*=float"]
    bitmill.quantize(tiny_model("lstm_lm"), "rtn", out=tmp_path / "out", bits=2, rules=rules, measure=0)
    formats = open_checkpoint(tmp_path / "out").formats
    assert formats["model.layers.0.hidden_hidden.f"].bits == 8
    assert formats["model.layers.0.hidden_hidden.i"].bits == 2
    assert not any("input_hidden" in name for name in formats)


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_streamed_equals_whole(layers):
    model = tiny_model("lstm_lm", num_hidden_layers=layers, **WHOLE)
    streamed = StreamedModel(ModuleSource(model))
    with streamed.non_block_weights():
        hidden, calls = streamed.embed(TOKENS)
        for index, call in enumerate(calls):
            hidden = call.run(streamed.load_block(index), hidden)
        assert torch.allclose(streamed.head(TOKENS, hidden), model(TOKENS).logits, atol=1e-5)


@torch.no_grad()
def test_generates(tmp_path):
    model = tiny_model("gru_lm")

    class Letters:
        def decode(self, ids, **options):
            return "".join(chr(97 + token % 26) for token in ids)

    written = generate(model, Letters(), [5, 6, 7], max_new_tokens=6)
    ids = [5, 6, 7]
    for token in written.tokens:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).shape[1] >= 4


def test_auto_classes_know_the_folder(tmp_path):
    model = tiny_model("lstm_lm")
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).embedding_size == 32
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)


def test_budget_chooses_for_every_gate(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    methods = [build_recipe("rtn", {"bits": bits, "group_size": 16}) for bits in (2, 8)]
    windows = torch.randint(3, 128, (10, 16), generator=torch.Generator().manual_seed(7))
    model = tiny_model("lstm_lm", num_hidden_layers=1)
    options = {"methods": methods, "corrections": 0, "calib": windows, "progress": False, "dry_run": True}
    outcome = bitmill.quantize(model, budget="5.0bpw", out=tmp_path / "out", **options)
    budget = outcome.summary["budget"]
    assert 4.0 < budget["bits_per_weight"] <= 5.0
    chosen = {kind["name"]: kind["chosen"] for kind in budget["kinds"]}
    assert set(chosen) == {f"{side}.{gate}" for side in ("input_hidden", "hidden_hidden") for gate in "ifgo"}
    assert len({str(each) for each in chosen.values()}) > 1
