"""Every file of a folder is recorded, written from the record, or foreign; foreign weights are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.record import record_measurement
from bitmill.checkpoint.verify import verify
from bitmill.errors import CheckpointError
from helpers.tiny_models import tiny_model

LAYER = "model.layers.0.self_attn.k_proj"
LOADERS = {
    "open": open_checkpoint,
    "load": bitmill.load,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
}


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "MODEL.SAFETENSORS",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.fp16.safetensors.index.json",
        "consolidated.00.pth",
        "model.gguf",
        "adapter_model.safetensors",
    ],
)
def test_foreign_weights_refused(folder, name, load):
    shutil.copy(shard_of(folder, "model.norm.weight"), folder / name)
    with pytest.raises(CheckpointError, match=r"is no part of the (quantized )?model"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_adapter_refused(folder, load):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(config))  # transformers would load the adapter, too
    with pytest.raises(CheckpointError, match="adapters/NAME"):
        load(folder)


def test_foreign_files_named(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "model.safetensors").write_text("no loader looks here")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.foreign == ("logs/", "notes.txt")
    assert {"config.json", "recipe.yaml"} < set(checkpoint.record)
    verify(checkpoint)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "recipe.yaml").write_text("name: other"), "recipe.yaml was altered"),
        (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe' is no regular file"),
    ],
    ids=["size", "missing", "fifo"],
)
def test_recorded_files_compared_on_load(folder, damage, message, load):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("subfolder", ["", "sub"])
def test_links_to_recorded_files_of_hub_cache(folder, subfolder, tmp_path):
    """The Hub's cache holds links to its blobs, and only the files that were asked for."""
    revision, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot = revision / subfolder
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        if path.name not in ("report.html", "recipe.yaml"):
            path.rename(blobs / path.name)
            (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    assert open_checkpoint(snapshot).record
    AutoModelForCausalLM.from_pretrained(revision, subfolder=subfolder)
    record_measurement(snapshot, {"text": "t", "split": "eval", "perplexity": 9.0})
    assert open_checkpoint(snapshot, digests="all").report["measured"]
    elsewhere = shutil.copy(shard_of(snapshot, "model.norm.weight"), tmp_path / "elsewhere")
    shard_of(snapshot, "model.norm.weight").unlink()
    shard_of(snapshot, "model.norm.weight").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"leaves the folder, to .*elsewhere; copy .*cp -rL"):
        open_checkpoint(snapshot)


def test_shard_with_tensors_that_index_lacks(folder):
    """transformers loads every tensor of a shard, listed or not."""
    shard = shard_of(folder, "model.norm.weight")
    save_file({**load_file(shard), f"{LAYER}.scale": torch.ones(16, 2)}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"holds the tensor '{LAYER}.scale'"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "files",
    [7, {"config.json": 7}, {"config.json": {"sha256": "x", "size_bytes": "9"}}, {"../x": "x"}, {"a\0b": "x"}],
    ids=repr,
)
def test_damaged_record(folder, files):
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "files": files}))
    with pytest.raises(CheckpointError, match=r"has no record|records the file"):
        open_checkpoint(folder)


def test_record_of_earlier_versions(folder):
    """Folders of earlier versions record digests alone, and have no empty weights."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(folder)
    markers = {f"{layer}.weight" for layer in checkpoint.formats}
    for shard in {shard_of(folder, name) for name in markers}:
        save_file({k: v for k, v in load_file(shard).items() if k not in markers}, shard, {"format": "pt"})
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in markers}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = json.loads((folder / "report.json").read_text())
    report["files"] = {name: entry["sha256"] for name, entry in report["files"].items()}
    (folder / "report.json").write_text(json.dumps(report))
    ids = torch.arange(8)[None]
    expected = bitmill.load(checkpoint.folder)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected)
    (folder / "report.json").unlink()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected)
    with pytest.raises(CheckpointError, match="nothing else tells the shape"):
        open_checkpoint(folder)


def test_one_flipped_bit_is_refused_by_every_loader_of_weights(folder):
    shard = shard_of(folder, f"{LAYER}.codes")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    open_checkpoint(folder)  # reads no weights
    for load in (bitmill.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="was altered since it was written"):
            load(folder)


def test_what_users_may_edit(folder):
    """How to generate is their choice; `verify` still names the change."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 9}))
    (folder / "training_args.bin").write_bytes(b"of a trainer")
    assert bitmill.load(folder).generation_config.max_new_tokens == 9
    assert open_checkpoint(folder).foreign == ("training_args.bin",)
    with pytest.raises(CheckpointError, match=r"generation_config\.json was altered"):
        verify(open_checkpoint(folder))


def test_changed_documents_are_refused_on_load(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(CheckpointError, match=r"config\.json was altered"):
        bitmill.load(folder)


def test_float_folder_with_calibration(tmp_path):
    """A folder whose weights were left as they are has a record too."""
    out = tmp_path / "out"
    bitmill.quantize(tiny_model("llama"), "none", kv="per_token", out=out)
    bitmill.load(out)
    shutil.copy(shard_of(out, "model.norm.weight"), out / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        bitmill.load(out)
