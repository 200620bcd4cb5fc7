"""Tiny GGUF files, written as llama.cpp's conversion script would: the inverse of what the reader undoes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k in llama.cpp's order: the two halves of a rotary pair side by side."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def stored_tensors(model) -> dict[str, torch.Tensor]:
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    out = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if architecture == "llama" and ".attn_q." in ours:
            tensor = interleave(tensor, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in ours:
            tensor = interleave(tensor, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "gpt2" and ours.endswith(TRANSPOSED):
            tensor = tensor.T
        out[ours] = tensor.contiguous()
    return out


def write_gguf(path: Path, model, *, kinds=None, extra=None, **changes) -> Path:
    """Write `model` as float32, with tensors named in `kinds` quantized, `extra` tensors added, and
    keys overridden or dropped by `changes`."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "layer_norm_epsilon", None),
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    for key, value in (keys | changes).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    specials = ["<s>", "</s>"]
    pairs = ["th", "he", "Ġa"]
    tokens = specials + letters + pairs
    tokens += [f"[unused{i}]" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "h e", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, tensor in (stored_tensors(model) | (extra or {})).items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor.numpy())
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decoded(model, name: str, kind: str) -> np.ndarray:
    """Return a tensor, in GGUF's own order, after quantization to `kind` and back."""
    number = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(stored_tensors(model)[name].numpy(), number), number)
