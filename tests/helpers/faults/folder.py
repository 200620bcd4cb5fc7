"""Damaged quantized folders, and other input that inspect, verify, eval, generate and chat refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from helpers.faults import Faults, change_json
from helpers.workspace import Workspace, save_model

fault = Faults()


COMMANDS = {
    "inspect": lambda workspace: ["inspect", str(workspace.done)],
    "verify": lambda workspace: ["verify", str(workspace.done)],
    "eval": lambda workspace: ["eval", str(workspace.done), "--text", "text.txt", "--seqlen", "32"],
}


def folder_fault(command: str, change: Callable[[Path], object], *words: object):
    def spoil(workspace, patch):
        change(workspace.done)
        return COMMANDS[command](workspace), list(words)

    return spoil


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def redirect(folder: Path, name: str, shard: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def quantization(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def reshape(folder: Path, shape: list[int]) -> None:
    report = json.loads((folder / "report.json").read_text())
    next(entry for entry in report["layers"] if "q_proj" in entry["name"])["shape"] = shape
    change_json(folder / "report.json", layers=report["layers"])


def drop(folder: Path, name: str) -> None:
    """Remove a tensor from its shard and from the index."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})


def link_out(folder: Path) -> None:
    shard = folder / SHARD
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def regroup(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["groups"]
    groups[0].update(changes)
    quantization(folder, groups=groups)


SHARD = "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"
for command in COMMANDS:
    fault |= {
        f"{command} of no folder": folder_fault(command, shutil.rmtree, "done"),
        f"{command} without a shard": folder_fault(command, lambda f: (f / SHARD).unlink(), SHARD),
        f"{command} of a truncated shard": folder_fault(
            command, lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-100]), SHARD
        ),
        f"{command} of an escaping index": folder_fault(
            command, lambda f: redirect(f, NORM, "../source/model.safetensors"), "../source/model.safetensors"
        ),
        f"{command} of a later version": folder_fault(
            command, lambda f: quantization(f, format_version=99), "version 99"
        ),
        f"{command} of an unknown format": folder_fault(
            command, lambda f: regroup(f, format={"format": "round", "bits": 3}), "'round'"
        ),
        f"{command} of absurd bits": folder_fault(
            command,
            lambda f: regroup(f, format={"format": "uniform", "bits": 10**9, "group_size": 16}),
            "1000000000",
        ),
        f"{command} of damaged groups": folder_fault(command, lambda f: quantization(f, groups=[1]), "groups"),
        f"{command} of damaged ends": folder_fault(command, lambda f: quantization(f, ends={"head": 1}), "'ends'"),
        f"{command} of layers that are not there": folder_fault(
            command, lambda f: regroup(f, layers=["model.layers.7.mlp.up_proj"]), "model.layers.7.mlp.up_proj"
        ),
        f"{command} of a tensor of another shape": folder_fault(
            command, lambda f: regroup(f, format={"format": "uniform", "bits": 3, "group_size": 16}), "codes"
        ),
        f"{command} of a report without layers": folder_fault(
            command, lambda f: change_json(f / "report.json", layers="none"), "layers is 'none'"
        ),
        f"{command} of a wrong shape in the report": folder_fault(
            command, lambda f: reshape(f, [48, 10**12]), "q_proj"
        ),
        f"{command} of a broken report": folder_fault(
            command, lambda f: (f / "report.json").write_text("[]"), "report.json"
        ),
        f"{command} of a broken config": folder_fault(
            command, lambda f: (f / "config.json").write_text('{"quantization_config": {"quant'), "config.json"
        ),
    }

fault |= {
    "inspect of a float model": lambda workspace, patch: (["inspect", str(workspace.source)], ["source"]),
    "inspect of a link out of the folder": folder_fault("inspect", link_out, SHARD),
    "inspect of another tool's folder": folder_fault(
        "inspect", lambda f: quantization(f, quant_method="awq"), "'awq'"
    ),
    "verify of a flipped bit": folder_fault("verify", lambda f: flip(f / SHARD), SHARD, "altered"),
    "verify of an altered tokenizer": folder_fault(
        "verify", lambda f: flip(f / "tokenizer.json"), "tokenizer.json"
    ),
    "verify without the tokenizer": folder_fault(
        "verify", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"
    ),
    "verify with no digests": folder_fault(
        "verify", lambda f: change_json(f / "report.json", files={}), "report.json"
    ),
    "verify with a wrong perplexity": folder_fault(
        "verify",
        lambda f: change_json(
            f / "report.json",
            measured=[
                {
                    "by": "quantize",
                    "text": "text.txt",
                    "split": "eval",
                    "seqlen": 32,
                    "windows": 2,
                    "perplexity": 5.25,
                }
            ],
        ),
        "5.25",
    ),
    "verify with a damaged measurement": folder_fault(
        "verify", lambda f: change_json(f / "report.json", measured=[{"by": "quantize"}]), "report.json"
    ),
    "verify with a measurement of no use": folder_fault(
        "verify", lambda f: change_json(f / "report.json", measured=7), "report.json"
    ),
    "verify without the text": folder_fault("verify", lambda f: (f.parent / "text.txt").unlink(), "text.txt"),
    "eval of a folder that lacks a tensor": folder_fault("eval", lambda f: drop(f, NORM), "altered since"),
    "eval split unknown": lambda workspace, patch: (["eval", str(workspace.done), "--split", "test"], ["'test'"]),
    "eval windows negative": lambda workspace, patch: (
        ["eval", str(workspace.done), "--text", "text.txt", "--seqlen", "32", "--windows", "-3"],
        ["windows is -3"],
    ),
    "eval seqlen too long": lambda workspace, patch: (
        ["eval", str(workspace.done), "--text", "text.txt", "--seqlen", "80"],
        ["80"],
    ),
    "eval record of a float model": lambda workspace, patch: (
        ["eval", str(workspace.source), "--text", "text.txt", "--record"],
        ["--record", workspace.source],
    ),
    "eval with a reference of another vocabulary": lambda workspace, patch: (
        other_vocabulary(workspace),
        ["vocabulary"],
    ),
    "generate without words": lambda workspace, patch: (
        ["generate", str(workspace.done), "--raw", "--prompt", ""],
        ["prompt"],
    ),
    "generate with too many words": lambda workspace, patch: (
        ["generate", str(workspace.done), "--raw", "--prompt", "w1 " * 70],
        ["70 tokens", "64"],
    ),
    "generate colder than 0": lambda workspace, patch: (
        ["generate", str(workspace.done), "--prompt", "w1", "--temperature", "-1"],
        ["temperature is -1"],
    ),
    "generate nothing": lambda workspace, patch: (
        ["generate", str(workspace.done), "--prompt", "w1", "--max-new-tokens", "0"],
        ["max_new_tokens is 0"],
    ),
    "chat without template": lambda workspace, patch: (
        ["chat", str(save_model(workspace.root / "plain", chat=False))],
        ["chat template", "plain"],
    ),
    "method card unknown": lambda workspace, patch: (["methods", "gtpq"], ["'gtpq'"]),
    "command unknown": lambda workspace, patch: (["quantise", "x"], ["quantise"]),
}


def other_vocabulary(workspace: Workspace) -> list[str]:
    model = LlamaForCausalLM.from_pretrained(workspace.source)
    model.resize_token_embeddings(200)
    model.save_pretrained(workspace.source)
    command = ["eval", str(workspace.done), "--text", "text.txt", "--seqlen", "32", "--windows", "1"]
    return [*command, "--reference", str(workspace.source)]
