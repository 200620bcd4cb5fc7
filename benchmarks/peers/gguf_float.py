"""The float model as an F16 GGUF file, from which llama.cpp makes its own formats.

A .gguf file keeps everything but its tensors' types; a folder of a Llama gets a file without a vocabulary,
which is enough to run token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from safetensors import safe_open

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_float(model: Path, out: Path) -> None:
    """Write `out`; whole or not at all."""
    partial = out.with_suffix(".partial")
    if model.is_dir():
        _from_folder(model, partial)
    else:
        _from_gguf(model, partial)
    partial.rename(out)


def _from_gguf(model: Path, out: Path) -> None:
    reader = gguf.GGUFReader(model)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    tensors = ((t.name, dequantize(t.data, t.tensor_type)) for t in reader.tensors)
    _write(writer, tensors)


def _from_folder(model: Path, out: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta") or rope.get("rope_theta", 10000.0))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, "np") as shard:
                for name in shard.keys():  # noqa: SIM118
                    tensor = shard.get_tensor(name)
                    if name.endswith("q_proj.weight"):
                        tensor = _interleaved(tensor, heads)
                    if name.endswith("k_proj.weight"):
                        tensor = _interleaved(tensor, kv_heads)
                    yield gguf_name(name), tensor

    _write(writer, tensors())


def gguf_name(name: str) -> str:
    """Return the name in GGUF of a tensor of a Llama; the linear layers of Gemma have these too."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, index, part = stem.split(".", 3)
        return f"blk.{index}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def _interleaved(W: np.ndarray, heads: int) -> np.ndarray:
    """GGUF rotates neighbouring rows of a head, transformers its halves."""
    return W.reshape(heads, 2, -1, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


def _write(writer: gguf.GGUFWriter, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, tensor in tensors:
        writer.add_tensor(name, tensor.astype(np.float32 if tensor.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
