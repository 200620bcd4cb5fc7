"""What goes wrong is said in one sentence that names the culprit, and nothing is lost.

A fault spoils a copy of the world and returns the command to run and the words its error must contain. Then:
the exit status is not 0, stdout is empty, stderr is one line, no file that was there changed, and the output
folder does not exist unless it did before.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from world import World, save_model, snapshot

from bitmill.cli.main import main

FAULTS: dict[str, Callable[..., tuple[list[str], list[object]]]] = {}


def fault(function):
    FAULTS[function.__name__.replace("_", " ").strip()] = function
    return function


# -- the disk -----------------------------------------------------------------------------------------------


def fails_with(code: int) -> Callable[..., None]:
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@fault
def disk_full_at_a_shard(world: World, patch: pytest.MonkeyPatch):
    patch.setattr("bitmill.checkpoint.files.save_file", fails_with(errno.ENOSPC))
    return world.quantize(), ["disk is full", "out.partial/model"]


@fault
def disk_full_at_the_journal(world, patch):
    patch.setattr("bitmill.checkpoint.files.os.fsync", fails_with(errno.ENOSPC))
    return world.quantize(), ["disk is full", "journal.json"]


@fault
def disk_full_at_the_tokenizer(world, patch):
    patch.setattr("bitmill.models.hf.shutil.copyfile", fails_with(errno.ENOSPC))
    return world.quantize(), ["No space left", "out.partial/model/"]


@fault
def disk_too_small_from_the_start(world, patch):
    patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    return world.quantize(), ["0 MB free", world.root]


@fault
def folder_not_writable(world, patch):
    patch.setattr("os.mkdir", fails_with(errno.EACCES))
    return world.quantize(), ["not writable", world.out]


@fault
def file_system_read_only_at_the_lock(world, patch):
    opened = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if self.name == "lock" and "w" in mode and not self.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(self, mode, *args, **kwargs)

    patch.setattr(Path, "open", refuse)
    return world.quantize(), ["not writable", "out.partial"]


@fault
def file_where_a_folder_is_needed(world, patch):
    return world.quantize(out=world.text / "out"), ["a part of the path is a file", world.text]


@fault
def output_exists(world, patch):
    return world.quantize(out=world.done), ["exists already", world.done]


@fault
def output_is_another_folder(world, patch):
    return world.quantize("--resume", out=world.source), ["no finished bitmill folder", world.source]


@fault
def no_output(world, patch):
    return ["quantize", str(world.source), "--method", "rtn"], ["-o"]


@fault
def output_in_use(world, patch):
    import fcntl

    held = (world.partial / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    patch.setattr(world, "held", held, raising=False)
    return world.quantize("--resume", out=world.half), ["Another process", world.partial]


# -- the model ----------------------------------------------------------------------------------------------


def weights(world: World) -> Path:
    return world.source / "model.safetensors"


def change_weight(world: World, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(weights(world))
    change(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, weights(world), {"format": "pt"})


def change_json(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


@fault
def model_not_there(world, patch):
    return ["quantize", "./nowhere", "-o", str(world.out)], ["./nowhere"]


@fault
def weights_truncated(world, patch):
    raw = weights(world).read_bytes()
    weights(world).write_bytes(raw[:-1000])
    return world.quantize(), ["truncated", weights(world)]


@fault
def weights_header_bit_flipped(world, patch):
    raw = bytearray(weights(world).read_bytes())
    at = raw.index(b'"F32"') + 1
    raw[at] ^= 0x04
    weights(world).write_bytes(raw)
    return world.quantize(), ["'B32'", weights(world)]


@fault
def weights_header_absurd(world, patch):
    raw = weights(world).read_bytes()
    weights(world).write_bytes((1 << 62).to_bytes(8, "little") + raw[8:])
    return world.quantize(), [1 << 62, weights(world)]


@fault
def weights_empty(world, patch):
    weights(world).write_bytes(b"")
    return world.quantize(), [weights(world)]


@fault
def weights_nan(world, patch):
    change_weight(world, lambda W: W[3, 5].fill_(float("nan")))
    return world.quantize(), ["model.layers.1.mlp.up_proj.weight", "1 NaN or Inf"]


@fault
def weights_infinite_without_calibration(world, patch):
    change_weight(world, lambda W: W[:2, 5].fill_(float("-inf")))
    return world.quantize("--measure", "0", method="rtn"), ["model.layers.1.mlp.up_proj.weight", "2 NaN or Inf"]


@fault
def weight_missing(world, patch):
    tensors = load_file(weights(world))
    del tensors["model.norm.weight"]
    save_file(tensors, weights(world), {"format": "pt"})
    return world.quantize(), ["model.norm.weight"]


@fault
def weight_of_another_shape(world, patch):
    change_json(world.source / "config.json", intermediate_size=64)
    return world.quantize(), ["(48, 32)", "(64, 32)"]


@fault
def architecture_unknown(world, patch):
    change_json(world.source / "config.json", model_type="frobnicator")
    return world.quantize(), ["frobnicator"]


@fault
def architecture_without_blocks(world, patch):
    from transformers import ResNetConfig

    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(world.source)
    return world.quantize(), ["source"]


@fault
def config_damaged(world, patch):
    (world.source / "config.json").write_text('{"model_type": "llama", ')
    return world.quantize(), [world.source / "config.json"]


@fault
def config_missing(world, patch):
    (world.source / "config.json").unlink()
    return world.quantize(), ["no config.json", world.source]


@fault
def model_pickled(world, patch):
    weights(world).rename(world.source / "pytorch_model.bin")
    return world.quantize(), ["pytorch_model.bin", "never unpickles"]


@fault
def model_quantized_by_another_tool(world, patch):
    change_json(world.source / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    return world.quantize(), ["already quantized by awq"]


@fault
def model_quantized_by_bitmill(world, patch):
    world.source = world.done
    return world.quantize(), ["already quantized by bitmill", world.done]


@fault
def model_index_escapes(world, patch):
    (world.source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../done/model-00001-of-00003.safetensors"}})
    )
    return world.quantize(), ["../done/model-00001-of-00003.safetensors", "outside"]


@fault
def model_shard_missing(world, patch):
    (world.source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )
    return world.quantize(), ["model-00001-of-00002.safetensors"]


@fault
def tokenizer_missing(world, patch):
    for path in world.source.glob("tokenizer*"):
        path.unlink()
    return world.quantize(), ["tokenizer", world.source]


def write_gguf_bytes(world: World, change: Callable[[bytearray], object]) -> Path:
    import gguf

    path = world.root / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("token_embd.weight", torch.ones(8, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)
    world.source = path
    return path


@fault
def gguf_truncated(world, patch):
    path = write_gguf_bytes(world, lambda raw: raw.__delitem__(slice(-64, None)))
    return world.quantize(), [path, "token_embd.weight"]


@fault
def gguf_header_bit_flipped(world, patch):
    path = write_gguf_bytes(world, lambda raw: raw.__setitem__(0, ord("G") ^ 1))
    return world.quantize(), [path, "FGUF"]


@fault
def gguf_header_absurd(world, patch):
    path = write_gguf_bytes(world, lambda raw: raw.__setitem__(slice(8, 16), b"\xff" * 8))
    return world.quantize(), [path, (1 << 64) - 1]


@fault
def gguf_incomplete(world, patch):
    write_gguf_bytes(world, lambda raw: None)
    return world.quantize(), ["llama.embedding_length"]


# -- the text -----------------------------------------------------------------------------------------------


def text_of(world: World, content: bytes, name: str = "other.txt") -> Path:
    world.text = world.root / name
    world.text.write_bytes(content)
    return world.text


@fault
def text_missing(world, patch):
    world.text = world.root / "no.txt"
    return world.quantize(), ["no.txt"]


@fault
def text_empty(world, patch):
    text_of(world, b" \n")
    return world.quantize(), ["other.txt", "no text"]


@fault
def text_too_short(world, patch):
    text_of(world, b"w1 " * 30)
    return world.quantize(), ["24 tokens"]


@fault
def text_too_short_to_measure(world, patch):
    text_of(world, b"w1 " * 100)
    return world.quantize(), ["20 tokens"]


@fault
def text_not_utf8(world, patch):
    text_of(world, b"w1 w2 \xff\xfe w3")
    return world.quantize(), ["other.txt", "0xff"]


@fault
def text_jsonl_bad(world, patch):
    text_of(world, b'{"text": "w1"}\n{"text": 3}\n', "other.jsonl")
    return world.quantize(), ["Line 2", "other.jsonl"]


@fault
def text_jsonl_broken(world, patch):
    text_of(world, b'{"text": "w1"}\n{"te', "other.jsonl")
    return world.quantize(), ["Line 2", "other.jsonl"]


@fault
def text_is_a_folder(world, patch):
    world.text = world.source
    return world.quantize(), ["source"]


@fault
def windows_longer_than_the_model_reads(world, patch):
    return world.quantize("--seqlen", "65"), ["seqlen is 65", "64"]


@fault
def samples_zero(world, patch):
    return world.quantize("--samples", "0"), ["samples is 0"]


@fault
def seqlen_negative(world, patch):
    return world.quantize("--seqlen", "-4"), ["seqlen is -4"]


@fault
def measure_negative(world, patch):
    return world.quantize("--measure", "-1"), ["measure is -1"]


# -- options ------------------------------------------------------------------------------------------------


def with_options(*options: str, method: str = "gptq", words: list[object]):
    def spoil(world, patch):
        command = ["quantize", str(world.source), "--calib", "text.txt", "--samples", "4", "--seqlen", "32"]
        return [*command, "--method", method, "-o", str(world.out), *options], words

    return spoil


FAULTS |= {
    "bits 0": with_options("--bits", "0", words=["not 0"]),
    "bits 9": with_options("--bits", "9", words=["not 9"]),
    "bits x": with_options("--bits", "x", words=["bits", "'x'"]),
    "bits 2.5": with_options("--set", "bits=2.5", words=["bits", "'2.5'"]),
    "bits twice": with_options("--bits", "3", "--set", "bits=4", words=["--bits 3", "bits=4"]),
    "group size -7": with_options("--group-size", "-7", words=["'-7'"]),
    "group size wide": with_options("--group-size", "wide", words=["'wide'"]),
    "set without value": with_options("--set", "damp", words=["'damp'"]),
    "set without key": with_options("--set", "=3", words=["'=3'"]),
    "set unknown key": with_options("--set", "dumb=3", words=["'dumb'", "damp"]),
    "set twice": with_options("--set", "damp=3", "--set", "damp=4", words=["damp", "'4'"]),
    "set word for number": with_options("--set", "damp=much", words=["damp", "'much'"]),
    "set nan": with_options("--set", "damp=nan", words=["damp", "nan"]),
    "set negative": with_options("--set", "damp=-1", words=["damp", "-1"]),
    "set word for truth": with_options("--set", "act_order=maybe", words=["act_order", "'maybe'"]),
    "set contradiction": with_options("--set", "static_groups=false", words=["act_order"]),
    "method unknown": with_options(method="gtpq", words=["'gtpq'", "gptq"]),
    "recipe missing": with_options(method="none.yaml", words=["none.yaml"]),
    "recipe with options": with_options("--bits", "3", method="none.yaml", words=["none.yaml", "bits"]),
    "device unknown": with_options("--device", "toaster", words=["'toaster'"]),
    "flag unknown": with_options("--bit", "3", words=["--bit"]),
    "number wanted": with_options("--samples", "many", words=["many"]),
}


@fault
def device_not_available(world, patch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return world.quantize("--device", "cuda"), ["'cuda'"]


def recipe_of(world: World, change: Callable[[str], str]) -> list[str]:
    path = world.root / "mine.yaml"
    path.write_text(change((world.done / "recipe.yaml").read_text()))
    command = ["quantize", str(world.source), "--calib", "text.txt", "--samples", "4", "--seqlen", "32"]
    return [*command, "--method", str(path), "-o", str(world.out)]


@fault
def recipe_no_yaml(world, patch):
    return recipe_of(world, lambda text: text.replace("weight:", "weight: {[")), ["YAML"]


@fault
def recipe_empty(world, patch):
    return recipe_of(world, lambda text: ""), ["recipe"]


@fault
def recipe_unknown_key(world, patch):
    return recipe_of(world, lambda text: text + "extra: 1\n"), ["extra"]


@fault
def recipe_unknown_format(world, patch):
    return recipe_of(world, lambda text: text.replace("format: uniform", "format: round")), ["'round'"]


@fault
def recipe_unknown_field(world, patch):
    return recipe_of(world, lambda text: text.replace("symmetric:", "symmetrical:")), ["symmetrical"]


@fault
def recipe_word_for_number(world, patch):
    return recipe_of(world, lambda text: text.replace("bits: 4", "bits: four")), ["'four'"]


@fault
def recipe_ignores_everything(world, patch):
    return recipe_of(world, lambda text: text.replace("ignore: []", "ignore: ['*']")), ["ignores every"]


# -- resuming -----------------------------------------------------------------------------------------------


@fault
def unfinished_run(world, patch):
    return world.quantize(out=world.half), [world.partial, "--resume"]


@fault
def resume_with_another_recipe(world, patch):
    return world.quantize("--resume", "--bits", "3", out=world.half), ["recipe.weight.bits", "was 4", "now 3"]


@fault
def resume_with_another_calibration(world, patch):
    return world.quantize("--resume", "--seed", "1", out=world.half), ["calibration.seed"]


@fault
def resume_with_another_text(world, patch):
    world.text.write_text(world.text.read_text().replace("w1 ", "w2 "))
    return world.quantize("--resume", out=world.half), ["calibration.sha256"]


@fault
def resume_with_another_model(world, patch):
    shutil.rmtree(world.source)
    save_model(world.source, seed=1)
    return world.quantize("--resume", out=world.half), ["model was"]


@fault
def resume_with_an_altered_shard(world, patch):
    shard = next((world.partial / "model").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    return world.quantize("--resume", out=world.half), [shard]


@fault
def resume_without_a_shard(world, patch):
    shard = next((world.partial / "model").glob("*.safetensors"))
    shard.unlink()
    return world.quantize("--resume", out=world.half), [shard]


def journal_fault(change: Callable[[dict], object], words: list[object]):
    def spoil(world, patch):
        path = world.partial / "journal.json"
        journal = json.loads(path.read_text())
        change(journal)
        path.write_text(json.dumps(journal))
        return world.quantize("--resume", out=world.half), [world.partial, *words]

    return spoil


FAULTS |= {
    "journal without blocks": journal_fault(lambda j: j.pop("blocks"), ["journal.json"]),
    "journal with blocks of no use": journal_fault(lambda j: j.update(blocks=[1]), ["journal.json"]),
    "journal entry without file": journal_fault(lambda j: j["blocks"][0].pop("file"), ["journal.json"]),
    "journal of another version": journal_fault(
        lambda j: j["identity"]["versions"].update(torch="1.0"), ["versions.torch", "'1.0'"]
    ),
    "journal with a wrong shape": journal_fault(
        lambda j: next(iter(j["blocks"][0]["layers"].values())).update(shape=[1, 2, 3]), ["journal.json"]
    ),
}


@fault
def journal_broken(world, patch):
    path = world.partial / "journal.json"
    path.write_text(path.read_text()[:-50])
    return world.quantize("--resume", out=world.half), [path]


@fault
def finished_with_another_recipe(world, patch):
    return world.quantize("--resume", "--bits", "3", out=world.done), ["recipe.weight.bits"]


# -- a quantized folder -------------------------------------------------------------------------------------

COMMANDS = {
    "inspect": lambda world: ["inspect", str(world.done)],
    "verify": lambda world: ["verify", str(world.done)],
    "eval": lambda world: ["eval", str(world.done), "--text", "text.txt", "--seqlen", "32"],
}


def folder_fault(command: str, change: Callable[[Path], object], *words: object):
    def spoil(world, patch):
        change(world.done)
        return COMMANDS[command](world), list(words)

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
    FAULTS |= {
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
        f"{command} of layers that are not there": folder_fault(
            command, lambda f: regroup(f, layers=["model.layers.7.mlp.up_proj"]), "model.layers.7.mlp.up_proj"
        ),
        f"{command} of a tensor of another shape": folder_fault(
            command, lambda f: regroup(f, format={"format": "uniform", "bits": 3, "group_size": 16}), "codes"
        ),
        f"{command} of a report without layers": folder_fault(
            command, lambda f: change_json(f / "report.json", layers="none"), "'layers'"
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

FAULTS |= {
    "inspect of a float model": lambda world, patch: (["inspect", str(world.source)], ["source"]),
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
    "eval of a folder that lacks a tensor": folder_fault("eval", lambda f: drop(f, NORM), NORM),
    "eval split unknown": lambda world, patch: (["eval", str(world.done), "--split", "test"], ["'test'"]),
    "eval windows negative": lambda world, patch: (
        ["eval", str(world.done), "--text", "text.txt", "--seqlen", "32", "--windows", "-3"],
        ["windows is -3"],
    ),
    "eval seqlen too long": lambda world, patch: (
        ["eval", str(world.done), "--text", "text.txt", "--seqlen", "80"],
        ["80"],
    ),
    "eval record of a float model": lambda world, patch: (
        ["eval", str(world.source), "--text", "text.txt", "--record"],
        ["--record", world.source],
    ),
    "eval with a reference of another vocabulary": lambda world, patch: (
        other_vocabulary(world),
        ["vocabulary"],
    ),
    "generate without words": lambda world, patch: (
        ["generate", str(world.done), "--raw", "--prompt", ""],
        ["prompt"],
    ),
    "generate with too many words": lambda world, patch: (
        ["generate", str(world.done), "--raw", "--prompt", "w1 " * 70],
        ["70 tokens", "64"],
    ),
    "generate colder than 0": lambda world, patch: (
        ["generate", str(world.done), "--prompt", "w1", "--temperature", "-1"],
        ["temperature is -1"],
    ),
    "generate nothing": lambda world, patch: (
        ["generate", str(world.done), "--prompt", "w1", "--max-new-tokens", "0"],
        ["max_new_tokens is 0"],
    ),
    "chat without template": lambda world, patch: (
        ["chat", str(save_model(world.root / "plain", chat=False))],
        ["chat template", "plain"],
    ),
    "method card unknown": lambda world, patch: (["methods", "gtpq"], ["'gtpq'"]),
    "command unknown": lambda world, patch: (["quantise", "x"], ["quantise"]),
}


def other_vocabulary(world: World) -> list[str]:
    model = LlamaForCausalLM.from_pretrained(world.source)
    model.resize_token_embeddings(200)
    model.save_pretrained(world.source)
    command = ["eval", str(world.done), "--text", "text.txt", "--seqlen", "32", "--windows", "1"]
    return [*command, "--reference", str(world.source)]


# -- the law ------------------------------------------------------------------------------------------------


# a tenth is enough to see that --json changes nothing
CASES = [(name, False) for name in FAULTS] + [(name, True) for name in list(FAULTS)[::10]]


@pytest.mark.parametrize(("name", "as_json"), CASES, ids=[n + " --json" * j for n, j in CASES])
def test_fault(name, as_json, world, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        command, words = FAULTS[name](world, patch)
        if as_json and command[0] not in ("chat", "quantise"):
            command = [*command, "--json"]
        before = snapshot(world.root)
        existed = world.out.exists()
        capsys.readouterr()
        status = main(command)
    out, err = capsys.readouterr()
    assert status in (1, 2), err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.rstrip().endswith((".", ";"))
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err
    after = snapshot(world.root)
    assert {k: v for k, v in after.items() if k in before} == before
    assert world.out.exists() == existed
    assert not [k for k in after if k not in before and not k.startswith("out.partial/")]
