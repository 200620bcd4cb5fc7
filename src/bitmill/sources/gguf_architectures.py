"""Conversion of names, layouts and metadata of llama.cpp to those of transformers, per architecture.

Sources: the inverse of the conversion script of llama.cpp (`convert_hf_to_gguf.py`), and its graph builders for
constants that no key holds (the attention scale of Gemma).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitmill.errors import SourceError, one_line
from bitmill.sources.config_bounds import check_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bitmill.sources.gguf_header import Header


@dataclass(frozen=True)
class Layout:
    """The layout of one architecture in GGUF.

    model_type: of the transformers config.
    blocks: path of the blocks in transformers.
    model_modules: modules outside the blocks, GGUF name -> path in transformers.
    block_modules: modules of a block, GGUF name -> path inside the block in transformers.
    config: function from metadata to arguments of the transformers config.
    interleaved: modules whose rows llama.cpp reorders for its rotary embedding -> config attribute with the number
        of heads.
    norm_plus_one: norm weights are stored as 1 + weight.
    transposed: modules that transformers stores (in, out).
    """

    model_type: str
    blocks: str
    model_modules: dict[str, str]
    block_modules: dict[str, str]
    config: Callable[[Metadata], dict[str, Any]]
    interleaved: dict[str, str]
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()


class Metadata:
    """The metadata of one architecture. A missing or mistyped key raises SourceError."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header = header
        self.architecture = architecture

    def optional(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default."""
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        # stored as float32: 1e-05 comes back as 9.999999747378752e-06
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number.

        Raises:
            SourceError: The value is missing or another one.
        """
        value = self.optional(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise SourceError(
                f"The GGUF key {self.architecture}.{key!s} is {value!r}, not a positive whole number; "
                "the file is damaged or of a variant that is not supported."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive real number.

        Raises:
            SourceError: The value is missing or another one.
        """
        value = self.optional(key, default)
        if not isinstance(value, float) or not value > 0:
            raise SourceError(
                f"The GGUF key {self.architecture}.{key!s} is {value!r}, not a positive number; "
                "the file is damaged or of a variant that is not supported."
            )
        return value

    def has_tensor(self, name: str) -> bool:
        """Return True if the file stores this tensor, such as a bias."""
        return name in self.header.tensors


def layout_for(header: Header) -> tuple[Layout, str]:
    """Return the layout and the name of `general.architecture`.

    Raises:
        SourceError: The architecture is not supported.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in LAYOUTS:
        raise SourceError(
            f"GGUF files of architecture {architecture!r} cannot be read; "
            f"supported are {', '.join(sorted(LAYOUTS))}, others need their safetensors folder."
        )
    experts = header.metadata.get(f"{architecture}.expert_count", 0)
    if experts:
        raise SourceError(
            f"The GGUF file holds a mixture of {experts} experts, which cannot be quantized yet; "
            "choose a dense model."
        )
    return LAYOUTS[architecture], architecture


def transformers_name(layout: Layout, name: str) -> str:
    """Return the name of a tensor in transformers.

    Args:
        layout: layout of the architecture.
        name: name in the file, "blk.3.attn_q.weight".

    Returns:
        For example "model.layers.3.self_attn.q_proj.weight".

    Raises:
        SourceError: The model has no such tensor.
    """
    module, _, leaf = name.rpartition(".")
    if module.startswith("blk."):
        _, index, inner = module.split(".", 2) if module.count(".") >= 2 else ("", "", "")
        if index.isdecimal() and inner in layout.block_modules and leaf in ("weight", "bias"):
            return f"{layout.blocks}.{int(index)}.{layout.block_modules[inner]}.{leaf}"
    elif module in layout.model_modules and leaf in ("weight", "bias"):
        return f"{layout.model_modules[module]}.{leaf}"
    raise SourceError(
        f"The GGUF tensor {name!r} has no counterpart in a {layout.model_type} model; "
        "the file is damaged or of a variant that is not supported."
    )


def gguf_name(layout: Layout, name: str) -> str:
    """Invert `transformers_name`.

    Raises:
        SourceError: GGUF has no such tensor.
    """
    module, _, leaf = name.rpartition(".")
    if module.startswith(f"{layout.blocks}."):
        index, _, inner = module.removeprefix(f"{layout.blocks}.").partition(".")
        for stored, path in layout.block_modules.items():
            if path == inner:
                return f"blk.{index}.{stored}.{leaf}"
    for stored, path in layout.model_modules.items():
        if path == module:
            return f"{stored}.{leaf}"
    raise SourceError(f"GGUF files of a {layout.model_type} model have no tensor {name!r}.")


def build_config(layout: Layout, header: Header, architecture: str) -> PretrainedConfig:
    """Return the transformers config that the metadata describes.

    Args:
        layout: layout of the architecture.
        header: header of the file.
        architecture: prefix of its keys.

    Raises:
        SourceError: Keys are missing, or the config classes of transformers reject them.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise SourceError("The GGUF file has no matrix 'token_embd.weight', so it is no language model.")
    values = layout.config(Metadata(header, architecture))
    check_config(values, "The GGUF file")
    tokenizer_ids = {
        f"{role}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    try:
        return AutoConfig.for_model(
            layout.model_type,
            vocab_size=embedding.shape[0],
            tie_word_embeddings="output.weight" not in header.tensors,
            architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[layout.model_type]],
            **tokenizer_ids,
            **values,
        )
    except Exception as error:  # the config classes validate, each in its own way
        raise SourceError(
            f"The GGUF metadata gives no valid {layout.model_type} config ({one_line(error)}); fetch it again."
        ) from error


def _decoder(keys: Metadata) -> dict[str, Any]:
    """Return the config values that most decoders share."""
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    per_head = keys.count("rope.dimension_count", hidden // heads)
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": keys.count("attention.key_length", per_head),
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys),
    }


def _rope(keys: Metadata) -> dict[str, Any]:
    """Return the rotary parameters. Raises SourceError for a scaling that is not supported."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.optional("rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind == "yarn":
        original = keys.count("rope.scaling.original_context_length")
        rope |= {"rope_type": "yarn", "factor": keys.number("rope.scaling.factor")}
        rope |= {"original_max_position_embeddings": original}
    elif kind != "none":
        raise SourceError(f"The GGUF file scales positions by {kind!r}; only linear and yarn are supported.")
    return rope


def _llama(keys: Metadata) -> dict[str, Any]:
    biased = {"attention_bias": keys.has_tensor("blk.0.attn_q.bias")}
    return _decoder(keys) | biased | {"mlp_bias": keys.has_tensor("blk.0.ffn_up.bias")}


def _gemma2(keys: Metadata) -> dict[str, Any]:
    values = _decoder(keys)
    # llama.cpp scales attention by 1/sqrt(head_dim), by hidden/heads in the 27B models alone
    largest = {"gemma2": 46, "gemma3": 62}[keys.architecture]
    per_head = values["hidden_size"] // values["num_attention_heads"]
    scalar = per_head if values["num_hidden_layers"] == largest else values["head_dim"]
    return values | {
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.optional("attn_logit_softcapping"),
        "final_logit_softcapping": keys.optional("final_logit_softcapping"),
    }


def _gemma3(keys: Metadata) -> dict[str, Any]:
    values = _gemma2(keys)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    full = {**values["rope_parameters"], "rope_theta": keys.number("rope.freq_base", 1000000.0)}
    return values | {"rope_parameters": {"sliding_attention": local, "full_attention": full}}


def _gpt2(keys: Metadata) -> dict[str, Any]:
    return {
        "n_embd": keys.count("embedding_length"),
        "n_inner": keys.count("feed_forward_length"),
        "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"),
        "n_positions": keys.count("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
    }


LLAMA = Layout(
    model_type="llama",
    blocks="model.layers",
    model_modules={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    block_modules={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    config=_llama,
    interleaved={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
)
QWEN2 = replace(LLAMA, model_type="qwen2", config=_decoder, interleaved={})
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA = replace(QWEN2, model_type="gemma", norm_plus_one=True)
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA2 = replace(GEMMA, model_type="gemma2", config=_gemma2, block_modules={**GEMMA.block_modules, **_AROUND})
GPT2 = Layout(
    model_type="gpt2",
    blocks="transformer.h",
    model_modules={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    block_modules={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    config=_gpt2,
    interleaved={},
    transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
)

LAYOUTS = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": replace(QWEN2, model_type="qwen3", block_modules={**QWEN2.block_modules, **_HEAD_NORMS}),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": replace(
        GEMMA2, model_type="gemma3_text", config=_gemma3, block_modules={**GEMMA2.block_modules, **_HEAD_NORMS}
    ),
    "gpt2": GPT2,
}

# -- rotary scaling of Llama 3 ---------------------------------------------------------------------------------
#
# llama.cpp stores, per rotary frequency f = theta^(-2i/d), the factor by which f is divided: 1 for wavelengths
# below original / high, `factor` above original / low, and 1 / ((1 - s) / factor + s) between, with
# s = (original / wavelength - low) / (high - low). transformers takes the four constants.

LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192  # of every Llama 3.1 to 3.3 model


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float = LOW, high: float = HIGH, original: int = ORIGINAL
) -> torch.Tensor:
    """Return the factors (head_dim / 2,) by which the scaling of Llama 3 divides rotary frequencies.

    Args:
        theta: base of the frequencies.
        head_dim: elements of a head.
        factor: of the longest wavelengths.
        low, high, original: the other constants.
    """
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def undo_rope_factors(config: PretrainedConfig, factors: torch.Tensor) -> None:
    """Set `config.rope_parameters` to the scaling that stored factors describe.

    Args:
        config: config of the model, changed in place.
        factors: (head_dim / 2,) factors of the GGUF file.

    Raises:
        SourceError: They are not those of Llama 3.
    """
    theta, factor = config.rope_parameters["rope_theta"], float(factors.max())
    expected = llama3_factors(theta, config.head_dim, factor)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise SourceError(
            f"The {factors.numel()} rotary factors in the GGUF file (largest {factor:g}) are not those of "
            "Llama 3, and no others are supported; use the safetensors folder of this model."
        )
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL,
    }
