"""The model to quantize is missing, damaged or unsupported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.faults import Faults, change_json
from helpers.workspace import Workspace

fault = Faults()


def weights(workspace: Workspace) -> Path:
    return workspace.source / "model.safetensors"


def change_weight(workspace: Workspace, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(weights(workspace))
    change(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, weights(workspace), {"format": "pt"})


@fault
def model_not_there(workspace, patch):
    return ["quantize", "./nowhere", "-o", str(workspace.out)], ["./nowhere"]


@fault
def weights_truncated(workspace, patch):
    raw = weights(workspace).read_bytes()
    weights(workspace).write_bytes(raw[:-1000])
    return workspace.quantize(), ["truncated", weights(workspace)]


@fault
def weights_header_bit_flipped(workspace, patch):
    raw = bytearray(weights(workspace).read_bytes())
    at = raw.index(b'"F32"') + 1
    raw[at] ^= 0x04
    weights(workspace).write_bytes(raw)
    return workspace.quantize(), ["B32", weights(workspace)]


@fault
def weights_header_absurd(workspace, patch):
    raw = weights(workspace).read_bytes()
    weights(workspace).write_bytes((1 << 62).to_bytes(8, "little") + raw[8:])
    return workspace.quantize(), [weights(workspace)]


@fault
def weights_empty(workspace, patch):
    weights(workspace).write_bytes(b"")
    return workspace.quantize(), [weights(workspace)]


@fault
def weights_nan(workspace, patch):
    change_weight(workspace, lambda W: W[3, 5].fill_(float("nan")))
    return workspace.quantize(), ["model.layers.1.mlp.up_proj.weight", "1 NaN or Inf"]


@fault
def weights_infinite_without_calibration(workspace, patch):
    change_weight(workspace, lambda W: W[:2, 5].fill_(float("-inf")))
    return workspace.quantize("--measure", "0", method="rtn"), [
        "model.layers.1.mlp.up_proj.weight",
        "2 NaN or Inf",
    ]


@fault
def weight_missing(workspace, patch):
    tensors = load_file(weights(workspace))
    del tensors["model.norm.weight"]
    save_file(tensors, weights(workspace), {"format": "pt"})
    return workspace.quantize(), ["model.norm.weight"]


@fault
def weight_of_another_shape(workspace, patch):
    change_json(workspace.source / "config.json", intermediate_size=64)
    return workspace.quantize(), ["(48, 32)", "(64, 32)"]


@fault
def architecture_unknown(workspace, patch):
    change_json(workspace.source / "config.json", model_type="frobnicator")
    return workspace.quantize(), ["frobnicator"]


@fault
def architecture_without_blocks(workspace, patch):
    from transformers import ResNetConfig

    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(workspace.source)
    return workspace.quantize(), ["source"]


@fault
def config_damaged(workspace, patch):
    (workspace.source / "config.json").write_text('{"model_type": "llama", ')
    return workspace.quantize(), [workspace.source / "config.json"]


@fault
def config_missing(workspace, patch):
    (workspace.source / "config.json").unlink()
    return workspace.quantize(), ["no config.json", workspace.source]


@fault
def model_pickled(workspace, patch):
    weights(workspace).rename(workspace.source / "pytorch_model.bin")
    return workspace.quantize(), ["pytorch_model.bin", "never unpickles"]


@fault
def model_quantized_by_another_tool(workspace, patch):
    change_json(workspace.source / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    return workspace.quantize(), ["already quantized by awq"]


@fault
def model_quantized_by_bitmill(workspace, patch):
    workspace.source = workspace.done
    return workspace.quantize(), ["already quantized by bitmill", workspace.done]


@fault
def model_index_escapes(workspace, patch):
    weights(workspace).unlink()  # which would be read instead of the index
    (workspace.source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../done/model-00001-of-00003.safetensors"}})
    )
    return workspace.quantize(), ["../done/model-00001-of-00003.safetensors", "outside"]


@fault
def model_shard_missing(workspace, patch):
    weights(workspace).unlink()  # which would be read instead of the index
    (workspace.source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )
    return workspace.quantize(), ["model-00001-of-00002.safetensors"]


@fault
def tokenizer_missing(workspace, patch):
    for path in workspace.source.glob("tokenizer*"):
        path.unlink()
    return workspace.quantize(), ["tokenizer", workspace.source]


def write_gguf_bytes(workspace: Workspace, change: Callable[[bytearray], object]) -> Path:
    import gguf

    path = workspace.root / "tiny.gguf"
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
    workspace.source = path
    return path


@fault
def gguf_truncated(workspace, patch):
    path = write_gguf_bytes(workspace, lambda raw: raw.__delitem__(slice(-64, None)))
    return workspace.quantize(), [path, "token_embd.weight"]


@fault
def gguf_header_bit_flipped(workspace, patch):
    path = write_gguf_bytes(workspace, lambda raw: raw.__setitem__(0, ord("G") ^ 1))
    return workspace.quantize(), [path, "FGUF"]


@fault
def gguf_header_absurd(workspace, patch):
    path = write_gguf_bytes(workspace, lambda raw: raw.__setitem__(slice(8, 16), b"\xff" * 8))
    return workspace.quantize(), [path, (1 << 64) - 1]


@fault
def gguf_incomplete(workspace, patch):
    write_gguf_bytes(workspace, lambda raw: None)
    return workspace.quantize(), ["llama.embedding_length"]
