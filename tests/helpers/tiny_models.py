"""Tiny models of every architecture, built in code."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from bitmill.architectures.adapter import ADAPTERS
from bitmill.tasks.base import TASKS, task_for

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT_SIZES = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
}
BERT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
RECURRENT_SIZES = {
    "embedding_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}

VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}
SWIN_SIZES = {
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
    "mlp_ratio": 2.0,
    "num_labels": 3,
}
TEXT_ADAPTERS = [name for name, adapter in ADAPTERS.items() if TASKS.get(adapter.task).reads == "text"]
VISION_ADAPTERS = [name for name in ADAPTERS.names() if name not in TEXT_ADAPTERS]


def tiny_vision_model(adapter: str):
    """A float32 vision model that an adapter describes, with seeded weights."""
    import transformers

    found = ADAPTERS.get(adapter)
    model_type = found.model_types[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SWIN_SIZES if model_type == "swin" else VISION_SIZES))
    auto_class = getattr(transformers, TASKS.get(found.task).auto_class_name)
    loaded = auto_class._model_mapping[type(config)]
    config.architectures = [(loaded[0] if isinstance(loaded, tuple) else loaded).__name__]
    model = auto_class.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_config(model_type: str, **changes):
    own = {"opt": OPT_SIZES, "gpt2": GPT2_SIZES, "bert": BERT_SIZES}
    sizes = {**own, "lstm_lm": RECURRENT_SIZES, "gru_lm": RECURRENT_SIZES}.get(model_type, SIZES)
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def tiny_model(model_type: str, **changes):
    """A float32 model with seeded weights; norm weights and biases are random too, not ones and zeros."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    model = task_for(config).auto_class.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(5)
    return model
