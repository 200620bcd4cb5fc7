"""A tiny model of every architecture, tokens to run it on, and the bytes of a quantized folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from bitmill.models.block_call import output_fn
from helpers.tiny_models import TEXT_ADAPTERS, tiny_model

MODELS = [*TEXT_ADAPTERS, "gpt_neox"]
WINDOWS = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(7))
TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(8))


def neox() -> nn.Module:
    """An architecture without an adapter of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, vocab_size=128, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).float().eval()


def model_of(name: str) -> nn.Module:
    return neox() if name == "gpt_neox" else tiny_model(name)


def answer(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits, or an encoder's hidden states."""
    return output_fn(model)(tokens)


def stored_bytes(folder: Path) -> int:
    total = 0
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            total += sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118
    return total
