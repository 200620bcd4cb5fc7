"""The model to quantize is missing, damaged or unsupported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.faults import Faults, change_json
from helpers.workspace import World

fault = Faults()


def weights(world: World) -> Path:
    return world.source / "model.safetensors"


def change_weight(world: World, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(weights(world))
    change(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, weights(world), {"format": "pt"})


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
