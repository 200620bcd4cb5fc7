"""A folder becomes a checkpoint of another program, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.errors import NumericsError, OutputError, UsageError
from bitmill.workflows.export import packed
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(7))
TOKENS = torch.arange(24).view(2, 12) + 3
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    options = {"bits": 4, "group_size": 32, "symmetric": True, "calib": WINDOWS, "measure": 0}
    bitmill.quantize(tiny_model("llama", **SIZES), "gptq", out=place / "packed", **options)
    return place / "packed"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_dense(folder, tmp_path):
    outcome = bitmill.export(folder, "dense", tmp_path / "out", dtype="float32")
    assert "any program" in str(outcome)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    expected = logits(bitmill.load(folder, dense=True))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_packed(folder, tmp_path, to):
    outcome = bitmill.export(folder, to, tmp_path / "out")
    assert outcome.layers == 14
    assert outcome.size_bytes < 0.6 * bitmill.export(folder, "dense", tmp_path / "dense").size_bytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == to
    assert config["dtype"] == "float16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith((".codes", "q_proj.scale", "q_proj.weight")) for name in tensors)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.norm.weight"], dense["model.norm.weight"])


def test_mlx(folder, tmp_path):
    assert bitmill.export(folder, "mlx", tmp_path / "out").layers == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    )
    bitmill.import_checkpoint(tmp_path / "out", tmp_path / "again")
    expected = logits(bitmill.load(folder, dense=True))
    assert torch.allclose(logits(bitmill.load(tmp_path / "again", dense=True)), expected, atol=2e-2)


def test_default_place(folder):
    outcome = bitmill.export(folder, "awq")
    assert outcome.out == folder.with_name("packed-awq")
    with pytest.raises(OutputError, match="exists already"):
        bitmill.export(folder, "awq")


def test_refused_before_anything_is_written(folder, tmp_path):
    bitmill.quantize(tiny_model("llama"), "gptqt", bits=3, out=tmp_path / "t", calib=WINDOWS, measure=0)
    with pytest.raises(UsageError, match=r"gptq cannot hold the layer 'model.*use --to dense"):
        bitmill.export(tmp_path / "t", "gptq", tmp_path / "out")
    with pytest.raises(UsageError, match="There is no export 'onnx'; choose one of dense, gguf, awq"):
        bitmill.export(folder, "onnx", tmp_path / "out")
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        bitmill.export(folder, "dense", tmp_path / "out", dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_experts_are_refused(tmp_path):
    model = tiny_model("mixtral", num_local_experts=4, **SIZES)
    bitmill.quantize(model, "rtn", bits=4, group_size=32, out=tmp_path / "moe", measure=0)
    with pytest.raises(UsageError, match="experts of a fused tensor"):
        bitmill.export(tmp_path / "moe", "compressed-tensors", tmp_path / "out")
    bitmill.export(tmp_path / "moe", "dense", tmp_path / "dense", dtype="float32")
    expected = logits(bitmill.load(tmp_path / "moe", dense=True))
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    assert torch.allclose(got, expected, atol=1e-5)


def test_range(folder, tmp_path):
    model = tiny_model("llama", **SIZES)
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    bitmill.quantize(model, "rtn", bits=4, group_size=32, out=tmp_path / "large", measure=0)
    with pytest.raises(NumericsError, match=r"model.norm.weight reaches .*; use --dtype bfloat16"):
        bitmill.export(tmp_path / "large", "gptq", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_dense_range(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    bitmill.quantize(model.to(torch.bfloat16), "rtn", bits=4, out=tmp_path / "large", measure=0)
    with pytest.raises(NumericsError, match=r"model.norm.weight is beyond .*float16; use --dtype bfloat16"):
        bitmill.export(tmp_path / "large", "dense", tmp_path / "out", dtype="float16")


def test_conv1d_is_refused(tmp_path):
    bitmill.quantize(tiny_model("gpt2"), "rtn", bits=4, group_size=32, out=tmp_path / "gpt2", measure=0)
    with pytest.raises(UsageError, match=r"no nn.Linear, which readers expect, or use --to dense"):
        bitmill.export(tmp_path / "gpt2", "compressed-tensors", tmp_path / "out")


def test_place_and_name(folder):
    with pytest.raises(OutputError, match="inside the folder that is exported"):
        bitmill.export(folder, "dense", folder / "inside")
    with pytest.raises(UsageError, match="There is no export 'a/b'"):
        bitmill.export(folder, "a/b")


def test_lost_parts_are_said(tmp_path):
    model = tiny_model("llama", **SIZES)
    bitmill.quantize(model, "rtn", bits=4, group_size=32, kv="rotated", out=tmp_path / "kv", measure=0)
    assert any("Keys and values" in note for note in bitmill.export(tmp_path / "kv", "awq").notes)


def test_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SHARD_BYTES", 50_000)
    bitmill.export(folder, "compressed-tensors", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
