"""Tokens a second of a Llama of 1.1 billion random weights, at several widths in turns.

    python benchmarks/decode_synthetic.py [--bits 4 3 2] [--head-bits 8] [--tokens 32] [--turns 3]

Speed does not depend on the numbers, so nothing is downloaded and nothing is quantized. Models take turns, so that
whatever else the machine does falls on all of them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bitmill.bench.kernels import random_packed
from bitmill.formats import FORMATS
from bitmill.runtime import swap_linear
from bitmill.runtime.decode import attach, decode_path

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def synthetic(bits: int, head_bits: int, group_size: int, **shape: int) -> Any:
    """A model whose linears are uniform at `bits` and whose head is at `head_bits`, with the step attached."""
    config = LlamaConfig(**{**SHAPE, **shape})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        format = FORMATS.get("uniform")(head_bits if name == "lm_head" else bits, group_size)
        layer = swap_linear(model, name, format, "meta")
        layer._buffers.update(random_packed(format, (linear.out_features, linear.in_features)))
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        made = torch.randn(parameter.shape) * 0.02 if parameter.dim() > 1 else torch.ones(parameter.shape)
        setattr(model.get_submodule(path), leaf, nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return attach(model.eval())


def token_times(model: Any, tokens: int) -> list[float]:
    """Seconds of each token after a prompt of 16."""
    cache = model(input_ids=torch.arange(16)[None], use_cache=True).past_key_values
    token, times = torch.tensor([[5]]), []
    for _ in range(tokens + 1):
        started = time.perf_counter()
        model(input_ids=token, past_key_values=cache)
        times.append(time.perf_counter() - started)
    return times[1:]  # the first prepares the step


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    models = {bits: synthetic(bits, given.head_bits, given.group_size) for bits in given.bits}
    times: dict[int, list[float]] = {bits: [] for bits in models}
    for _ in range(given.turns):
        for bits, model in models.items():
            times[bits] += token_times(model, given.tokens)
    result = {
        "threads": torch.get_num_threads(),
        "settings": vars(given),
        "path": {bits: decode_path(model) for bits, model in models.items()},
        "tokens_per_s": {bits: 1 / median(all) for bits, all in times.items()},
        "best_tokens_per_s": {bits: 1 / min(all) for bits, all in times.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
