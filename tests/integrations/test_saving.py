"""A quantized model is saved into no folder with a record, and into others so that they load."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.errors import OutputError
from helpers.tiny_models import tiny_model
from helpers.workspace import snapshot

IDS = torch.arange(3, 19)[None]
SHARDS = {"max_shard_size": "20KB"}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Shared; not to be changed."""
    out = tmp_path_factory.mktemp("saving") / "out"
    bitmill.quantize(tiny_model("llama"), "rtn", out=out, bits=4, group_size=16, measure=0)
    return out


def dense(folder: Path):
    return bitmill.load(folder, dense=True)


def copied(folder: Path):
    return copy.deepcopy(bitmill.load(folder))


@pytest.mark.parametrize("load", [bitmill.load, AutoModelForCausalLM.from_pretrained, dense, copied])
def test_folder_with_record_refused(written, load):
    before, model = snapshot(written), load(written)
    for options in ({}, SHARDS):
        with pytest.raises(OutputError, match="save the model into another folder"):
            model.save_pretrained(written, **options)
    assert snapshot(written) == before


def test_float_folder_with_record_refused(tmp_path):
    bitmill.quantize(tiny_model("llama"), "none", kv="per_token", out=tmp_path / "out")
    model, before = bitmill.load(tmp_path / "out"), snapshot(tmp_path / "out")
    with pytest.raises(OutputError, match="save the model into another folder"):
        model.save_pretrained(tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("saves", [({}, SHARDS, {}), (SHARDS, {}, SHARDS)], ids=["single first", "shards first"])
def test_folder_of_the_model_itself(written, saves, tmp_path):
    model, folder = bitmill.load(written), tmp_path / "out"
    expected = logits(model)
    for options in saves:
        model.save_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder)  # its tensors are mapped files of the folder
        assert torch.equal(logits(model), expected)


def test_copies_save_their_own_tensors(written, tmp_path):
    model = bitmill.load(written)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    for name, saved in (("deep copy", other), ("pickle", pickle.loads(pickle.dumps(other)))):
        saved.save_pretrained(tmp_path / name)
        assert torch.equal(logits(bitmill.load(tmp_path / name)), logits(other))
    assert not torch.equal(logits(other), logits(model))
