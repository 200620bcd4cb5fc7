"""The metadata of a GGUF file: hyperparameters from a config, and the vocabulary of a byte-level BPE tokenizer.

Source: the conversion script of llama.cpp (`convert_hf_to_gguf.py`), whose inverse reads such files here.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from bitmill.errors import UsageError

# The pre-tokenizer of a tokenizer.json, by a mark of its own -> its name in llama.cpp
_PRE = (
    (r"\\p{N}{1,3}", "llama-bpe"),
    (r"'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|", "qwen2"),
    ('"Digits"', "smollm"),
)


def write_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Write the keys of an architecture.

    Args:
        writer: of the file.
        config: a transformers config of Llama's kind, or GPT-2.

    Raises:
        UsageError: positions are scaled in a way that is not exported.
    """
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type("linear")  # type: ignore[arg-type]
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):  # the factors of Llama 3 are a tensor
        raise UsageError(f"Positions that are scaled by {kind!r} are not exported to gguf; use another target.")
    writer.add_rope_freq_base(rope["rope_theta"])


def write_vocabulary(writer: GGUFWriter, tokenizer: Any, vocabulary: int) -> None:
    """Write tokens, merges, special tokens and the chat template of a byte-level BPE tokenizer.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer of transformers.
        vocabulary: rows of the embedding; rows without a token get a name of their own.

    Raises:
        UsageError: it is another kind of tokenizer.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = document["model"], json.dumps(document.get("pre_tokenizer"))
    name = next((name for mark, name in _PRE if mark in pre), "gpt-2" if "ByteLevel" in pre else None)
    if model.get("type") != "BPE" or name is None or model.get("byte_fallback"):
        raise UsageError(
            "The tokenizer is no byte-level BPE, and no other vocabulary is exported to gguf; use another target."
        )
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    by_id = {number: token for token, number in model["vocab"].items()}
    tokens, types = list[str](), list[int]()
    for number in range(vocabulary):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        elif number in by_id:
            tokens.append(by_id[number])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        special = getattr(tokenizer, f"{role}_token_id", None)
        if special is not None:
            add(special)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(encoded) and encoded[0] == getattr(tokenizer, "bos_token_id", None))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
