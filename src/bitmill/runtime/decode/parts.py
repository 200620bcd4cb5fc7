"""Models that the compiled step supports: those it was written for, identified by their exact classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitmill.formats.quantized import SHARED
from bitmill.runtime.modules.embedding import QuantEmbedding
from bitmill.runtime.modules.linear import QuantLinear

# Names and shapes do not reveal a multiplier, a scale by position or blocks without rotary embedding, which
# configs of other classes may have; so no other class is supported, not even one derived from these.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
GATED = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("eager", "sdpa", "bitmill", None)  # bitmill: sdpa, but for packed caches


class NotEligibleError(Exception):
    """A model cannot use the compiled step; the message is a phrase with the reason."""


def model_parts(model: Any) -> tuple[Any, Any, list[Any]]:
    """Return the base model, the head and the blocks of a Llama, Mistral, Qwen2 or Qwen3 of transformers.

    Raises:
        NotEligibleError: for any other class among its modules, and for features that the step lacks.
    """
    family = next((f for f in FAMILIES if _class(model) == _class_of(f, "ForCausalLM")), None)
    if family is None:
        raise _foreign_class(model)
    base, head = model.model, model.lm_head
    layers = list(base.layers)
    expected = [(base, "Model"), (base.norm, "RMSNorm"), (base.rotary_emb, "RotaryEmbedding")]
    matches = [
        _names(model) - {SHARED} == {"model", "lm_head"},
        _names(base) == {"embed_tokens", "layers", "norm", "rotary_emb"},
        type(base.layers) is nn.ModuleList and bool(layers),
    ]
    for layer in layers:
        attention = _names(layer.self_attn)
        expected += [(layer, "DecoderLayer"), (layer.self_attn, "Attention"), (layer.mlp, "MLP")]
        expected += [(layer.input_layernorm, "RMSNorm"), (layer.post_attention_layernorm, "RMSNorm")]
        expected += [(getattr(layer.self_attn, name), "RMSNorm") for name in HEAD_NORMS if name in attention]
        matches += [
            _names(layer) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
            attention == {*PROJECTIONS, *(HEAD_NORMS if family == "qwen3" else ())},
            _names(layer.mlp) == {*GATED, "act_fn"},
        ]
    for module, part in expected:
        if _class(module) != _class_of(family, part):
            raise _foreign_class(module)
    for module in (head, base.embed_tokens):
        if type(module) not in (nn.Linear, nn.Embedding, QuantLinear, QuantEmbedding):
            raise _foreign_class(module)
    if not all(matches):
        raise NotEligibleError(f"its modules are not those of a {type(model).__name__}")
    _check_config(model.config, len(layers))
    return base, head, layers


def _check_config(config: Any, layers: int) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or (sliding and not getattr(config, "layer_types", None)):
        raise NotEligibleError("its attention uses a sliding window")
    if layers != config.num_hidden_layers:
        raise NotEligibleError("its config names another number of blocks")
    if config._attn_implementation not in _ATTENTION:
        raise NotEligibleError(f"its attention is {config._attn_implementation!r}, not eager or sdpa")


def _class(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _class_of(family: str, part: str) -> tuple[str, str]:
    return f"transformers.models.{family}.modeling_{family}", FAMILIES[family] + part


def _foreign_class(module: Any) -> NotEligibleError:
    path, name = _class(module)
    return NotEligibleError(f"{name} of {path} is no part of transformers' Llama, Mistral, Qwen2 or Qwen3")


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
