"""A live module is quantized completely or left unchanged, and reported correctly."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import bitmill
from bitmill.api import stored_bits
from bitmill.errors import BitmillError, UsageError
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.recipes.rules import FLOAT, Rule
from bitmill.runtime.modules.linear import QuantLinear
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


def test_failed_run_restores_module():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(BitmillError, match=r"layers\.1\.mlp\.up_proj"):
        bitmill.quantize(model, "gptq", calib=WINDOWS, bits=4, group_size=16)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].nan_to_num(7), before[n].nan_to_num(7)) for n in before)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_every_linear_replaced(model_type):
    model = tiny_model(model_type)
    outcome = bitmill.quantize(model, "gptq", calib=WINDOWS, bits=4, group_size=16)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == len(outcome.report["layers"]) == outcome.summary["layers"]
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(WINDOWS).logits.isfinite().all()


def test_live_model_bits():
    model = tiny_model("llama")
    assert stored_bits(model, False)[0] == 32
    outcome = bitmill.quantize(model, "rtn", calib=WINDOWS, bits=4, group_size=16)
    bits, size = stored_bits(model, False)
    assert bits == pytest.approx(outcome.summary["bits_per_weight"])
    assert size == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


class Words:
    """A tokenizer of sorts."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}


def test_training_mode_restored(tmp_path):
    (tmp_path / "text.txt").write_text("All that glitters is not gold. " * 20)
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    terms = {"text": str(tmp_path / "text.txt"), "seqlen": 16, "windows": 2, "tokenizer": Words()}
    expected = bitmill.evaluate(model, **terms)["perplexity"]
    model.train()
    model.transformer.h[0].eval()
    assert bitmill.evaluate(model, reference=model, **terms)["perplexity"] == expected
    assert model.training
    assert not model.transformer.h[0].training


@pytest.mark.parametrize("name", ["*.q_porj", "*norm", "model.layers"])
def test_ignored_name_must_exist(name):
    recipe = replace(build_recipe("rtn", {"group_size": 16}), rules=(Rule(name, FLOAT),))
    with pytest.raises(UsageError, match="matrix of weights is called " + re.escape(repr(name))):
        bitmill.quantize(tiny_model("llama"), recipe, calib=WINDOWS)


def test_ignored_head():
    recipe = build_recipe("rtn", {"group_size": 16})
    rules = (Rule("*.o_proj", FLOAT), Rule("lm_head", FLOAT))
    bitmill.quantize(tiny_model("llama"), replace(recipe, rules=rules), calib=WINDOWS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_unpacked_model_saved_as_float(tmp_path, model_type):
    tiny_model(model_type).save_pretrained(tmp_path / "float")
    bitmill.quantize(tmp_path / "float", "rtn", out=tmp_path / "packed", measure=0, group_size=16)
    model = bitmill.load(tmp_path / "packed", dense=True)
    model.save_pretrained(tmp_path / "unpacked")
    back = bitmill.load(tmp_path / "unpacked")
    assert torch.equal(back(WINDOWS).logits, model(WINDOWS).logits)
    assert "quantization_config" not in back.config.to_dict()


def test_folder_needs_known_model(tmp_path):
    with pytest.raises(UsageError, match="Sequential has no transformers config"):
        bitmill.quantize(nn.Sequential(nn.Linear(4, 4)), "rtn", out=tmp_path / "out", measure=0)


def test_rules_by_keyword():
    model = tiny_model("llama")
    rules = ["*.o_proj=float", Rule("*.down_proj", Uniform(8, 16))]
    summary = bitmill.quantize(model, "rtn", calib=WINDOWS, bits=4, group_size=16, rules=rules).summary
    assert sorted(entry["format"]["bits"] for entry in summary["formats"]) == [4, 8]
    assert isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    assert not isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
