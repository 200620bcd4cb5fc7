"""Whisper of a CTranslate2 file as a folder of transformers.

The file is a list of named tensors. Queries, keys and values of self-attention are fused there, and keys and
values of cross-attention; the bias of keys, which transformers has not, is zero.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.files import write_tensors

WIDTH, LAYERS, HEADS, HIDDEN = 512, 6, 8, 2048
_FLOAT16 = 4  # its type in the file
_NORM = {"gamma": "weight", "beta": "bias"}
CONFIG: dict[str, Any] = {
    "architectures": ["WhisperForConditionalGeneration"],
    "bos_token_id": 50257,
    "d_model": WIDTH,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": HIDDEN,
    "decoder_layers": LAYERS,
    "decoder_start_token_id": 50258,
    "dtype": "float16",
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "encoder_layers": LAYERS,
    "eos_token_id": 50257,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "model_type": "whisper",
    "num_mel_bins": 80,
    "pad_token_id": 50257,
    "vocab_size": 51865,
}
PREPROCESSOR: dict[str, Any] = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "hop_length": 160,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "WhisperProcessor",
    "return_attention_mask": False,
    "sampling_rate": 16000,
}
TOKENIZER: dict[str, Any] = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "model_max_length": 448,
    "pad_token": "<|endoftext|>",
    "processor_class": "WhisperProcessor",
    "tokenizer_class": "WhisperTokenizer",
    "unk_token": "<|endoftext|>",
}


def write_whisper(joined: Path, folder: Path) -> None:
    """Write a model of CTranslate2 as a folder that transformers loads as WhisperForConditionalGeneration.

    Args:
        joined: folder with the parts of model.bin, config.json and tokenizer.json.
        folder: folder to write; its bytes depend on these files alone.

    Raises:
        SourceError: the file is of another model, or is damaged.
    """
    parts = sorted(joined.glob("model.bin.part*"))
    stored = dict(_tensors(b"".join(part.read_bytes() for part in parts)))
    folder.mkdir(parents=True)
    own = json.loads((joined / "config.json").read_text(encoding="utf-8"))
    generation = _generation(own, json.loads((joined / "tokenizer.json").read_text(encoding="utf-8")))
    documents = {"config": CONFIG, "preprocessor_config": PREPROCESSOR, "tokenizer_config": TOKENIZER}
    for name, content in {**documents, "generation_config": generation}.items():
        (folder / f"{name}.json").write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    shutil.copyfile(joined / "tokenizer.json", folder / "tokenizer.json")
    try:
        write_tensors(folder / "model.safetensors", _parameters(stored))
    except (KeyError, ValueError) as error:
        raise SourceError(f"The file of CTranslate2 is of another model ({error}); fetch it again.") from error


def _tensors(data: bytes) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every fp16 tensor of a file of CTranslate2. Raises SourceError."""
    at = 0

    def number(form: str) -> int:
        nonlocal at
        found: int = struct.unpack_from(f"<{form}", data, at)[0]
        at += struct.calcsize(form)
        return found

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    try:
        number("I"), text(), number("I")  # version, kind of model and its revision
        for _ in range(number("I")):
            name, shape = text(), [number("I") for _ in range(number("B"))]
            kind, size = number("B"), number("I")
            if at + size > len(data):
                raise ValueError("it ends inside a tensor")
            if kind == _FLOAT16:
                raw = bytearray(data[at : at + size])
                yield name, torch.frombuffer(raw, dtype=torch.float16).reshape(shape)
            at += size
    except (struct.error, ValueError, RuntimeError) as error:
        raise SourceError(f"The file of CTranslate2 cannot be read ({error}); fetch it again.") from error


def _parameters(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of WhisperForConditionalGeneration by name."""
    found = {"model.decoder.embed_tokens.weight": stored["decoder/embeddings/weight"]}
    for number in (1, 2):
        for kind in ("weight", "bias"):
            found[f"model.encoder.conv{number}.{kind}"] = stored[f"encoder/conv{number}/{kind}"]
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = stored[f"{side}/position_encodings/encodings"]
        found |= _norm(stored, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(LAYERS):
            found |= _block(stored, f"{side}/layer_{index}", f"model.{side}.layers.{index}")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _block(stored: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Return the parameters of one block; those of an encoder have no cross-attention."""
    found = _norm(stored, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
    found |= _norm(stored, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    layers = {
        "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention/linear_1": ("self_attn.out_proj",),
        "ffn/linear_0": ("fc1",),
        "ffn/linear_1": ("fc2",),
    }
    if f"{old}/attention/linear_0/weight" in stored:
        found |= _norm(stored, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
        layers |= {
            "attention/linear_0": ("encoder_attn.q_proj",),
            "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
            "attention/linear_2": ("encoder_attn.out_proj",),
        }
    for name, linears in layers.items():
        for kind in ("weight", "bias"):
            for linear, part in zip(linears, stored[f"{old}/{name}/{kind}"].chunk(len(linears))):
                if not linear.endswith("k_proj") or kind == "weight":
                    found[f"{new}.{linear}.{kind}"] = part
    return found


def _norm(stored: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.{name}": stored[f"{old}/{kind}"] for kind, name in _NORM.items()}


def _generation(own: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the generation config: tokens of languages and tasks, and those that are never written."""
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    languages = [token for token, number in ids.items() if number in own["lang_ids"]]
    return {
        "alignment_heads": own["alignment_heads"],
        "begin_suppress_tokens": own["suppress_ids_begin"],
        "bos_token_id": CONFIG["bos_token_id"],
        "decoder_start_token_id": CONFIG["decoder_start_token_id"],
        "eos_token_id": CONFIG["eos_token_id"],
        "is_multilingual": True,
        "lang_to_id": {token: ids[token] for token in languages},
        "max_initial_timestamp_index": 50,
        "max_length": CONFIG["max_target_positions"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "pad_token_id": CONFIG["pad_token_id"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "suppress_tokens": own["suppress_ids"],
        "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
    }
