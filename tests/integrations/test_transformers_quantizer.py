"""from_pretrained checks what bitmill.load checks, and save_pretrained writes what can be loaded again."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers import auto

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.errors import CheckpointError
from helpers.tiny_models import tiny_model

LAYER = "model.layers.0.self_attn.k_proj"
IDS = torch.arange(3, 19)[None]
RTN = {"method": "rtn", "bits": 4, "group_size": 16}
HEAD = {**RTN, "head_bits": 4}
SHARED = {"method": "aqlm", "shared": True, "codebook_bits": 4, "rounds": 2, "sweeps": 1, "epochs": 1}
MODELS = {
    "llama": ("llama", {}, RTN),
    "tied": (
        "llama",
        {"tie_word_embeddings": True},
        HEAD,
    ),
    "head": ("llama", {}, HEAD),
    "gpt2": ("gpt2", {}, HEAD),
    "gemma": ("gemma3_text", {}, HEAD),
    "rotated": ("llama", {}, {"method": "quip"}),
    "shared": (
        "llama",
        {},
        SHARED,
    ),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def quantized(kind: str):
    family, sizes, recipe = MODELS[kind]
    windows = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(1))
    return bitmill.quantize(tiny_model(family, **sizes), calib=windows, measure=0, **recipe).model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantizer") / "out"
    bitmill.quantize(tiny_model("llama"), "rtn", out=out, bits=4, group_size=16, measure=0)
    return out


def spoil(folder: Path, change, name: str = f"{LAYER}.codes") -> None:
    """Change the tensors of the shard with `name`, in a folder without a record."""
    (folder / "report.json").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    before = load_file(shard)
    tensors = change(dict(before))
    save_file(tensors, shard, {"format": "pt"})
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in before or k in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


LOADERS = {"load": bitmill.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}
DAMAGES = {
    "no codes": (f"{LAYER}.codes", without(f"{LAYER}.codes"), "codes"),
    "no scale": (f"{LAYER}.codes", without(f"{LAYER}.scale"), "scale"),
    "type": (
        f"{LAYER}.codes",
        lambda t: {**t, f"{LAYER}.scale": t[f"{LAYER}.scale"].view(torch.bfloat16)},
        "scale",
    ),
    "rows": (f"{LAYER}.codes", lambda t: {**t, f"{LAYER}.codes": t[f"{LAYER}.codes"][:-1].clone()}, "codes"),
    "shape": (f"{LAYER}.codes", lambda t: {**t, f"{LAYER}.weight": torch.empty(0, 8, 32)}, "is torch.int32"),
    "weight": (f"{LAYER}.codes", lambda t: {**t, f"{LAYER}.weight": torch.ones(16, 32)}, "is quantized"),
    "norm": ("model.norm.weight", without("model.norm.weight"), "lacks the tensor 'model.norm.weight'"),
    "norm shape": (
        "model.norm.weight",
        lambda t: {**t, "model.norm.weight": torch.ones(7)},
        "norm.weight|cannot be",
    ),
}


@pytest.mark.parametrize(
    "load", [bitmill.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_refused(written, damage, load, tmp_path):
    folder = shutil.copytree(written, tmp_path / "out")
    name, change, message = DAMAGES[damage]
    spoil(folder, change, name)
    with pytest.raises((CheckpointError, RuntimeError), match=message + "|ignore_mismatched_sizes"):
        load(folder)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda g: g["layers"].remove(LAYER), LAYER),
        (lambda g: g["layers"].append("model.layers.1.mlp.act"), "model.layers.1.mlp.act"),
        (lambda g: g["format"].update(bits=3), "codes"),
        (lambda g: g["format"].update(group_size=8), "scale|zero"),
    ],
    ids=["gone", "more", "bits", "groups"],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_damaged_config_refused(written, groups, message, recorded, tmp_path):
    folder = shutil.copytree(written, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    groups(config["quantization_config"]["groups"][0])
    (folder / "config.json").write_text(json.dumps(config))
    if not recorded:
        (folder / "report.json").unlink()
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises((CheckpointError, RuntimeError), match=message + "|ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(folder, **options)


def test_other_classes_and_files(written):
    with pytest.raises(CheckpointError, match="load it with the model class"):
        AutoModel.from_pretrained(written)
    config = LlamaForCausalLM.from_pretrained(written).config
    config.quantization_config.groups[0]["layers"].remove(LAYER)
    with pytest.raises(CheckpointError, match="The config is not that of"):
        LlamaForCausalLM.from_pretrained(written, config=config)


def test_state_dict_without_tensor(written):
    model = LlamaForCausalLM.from_pretrained(written)
    state = model.state_dict()
    again = LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=dict(state))
    assert torch.equal(logits(again), logits(model))
    del state[f"{LAYER}.scale"]
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{LAYER}.scale'"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_copy_of_model_quantized_in_place(kind, tmp_path):
    model = quantized(kind)
    expected = logits(model)
    copy.deepcopy(model).save_pretrained(tmp_path / "one")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(copied), expected)
    copied.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    loaded = bitmill.load(tmp_path / "two")
    assert torch.equal(logits(loaded), expected)
    loaded.load_state_dict(model.state_dict())
    checkpoint = open_checkpoint(tmp_path / "one")
    assert not checkpoint.record
    assert {entry["name"] for entry in checkpoint.layers()} >= set(checkpoint.formats)
    with pytest.raises(CheckpointError, match="nothing can be verified"):
        verify(checkpoint)
    dense = bitmill.load(tmp_path / "one", dense=True)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


def test_save_of_changed_layers_refused(tmp_path):
    model = quantized("llama")
    layer = model.get_submodule(LAYER)
    model.set_submodule(LAYER, torch.nn.Linear(layer.in_features, layer.out_features, bias=False))
    with pytest.raises(CheckpointError, match="not those of its quantization_config"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("saved", [False, True], ids=["written", "saved"])
def test_folder_cannot_be_opened_without_bitmill(kind, saved, tmp_path, monkeypatch):
    """transformers alone must stop, and not go on with random weights."""
    if saved:
        quantized(kind).save_pretrained(tmp_path / "out")
    else:
        family, sizes, recipe = MODELS[kind]
        bitmill.quantize(tiny_model(family, **sizes), out=tmp_path / "out", measure=0, **recipe)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "bitmill")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "bitmill")
    for loader in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loader.from_pretrained(tmp_path / "out")
