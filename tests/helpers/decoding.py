"""Helpers of the decode step tests: tiny models of odd sizes, quantized in place, and both forward paths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitmill.formats import Format, Wrapper
from bitmill.formats.quantized import nearest_matrix
from bitmill.runtime.decode import attach
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import fitted
from helpers.tiny_models import tiny_model

ODD = {
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 101,
    "max_position_embeddings": 96,
}
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 61]])


def odd_model(kind: str = "llama", **changes):
    return tiny_model(kind, **{**ODD, "eos_token_id": None, **changes})


def quantize(model: nn.Module, format: Format) -> nn.Module:
    """Every linear of the blocks rounded to `format`, data-free."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and "head" not in n]
    for name, linear in found:
        W = linear.weight.detach()
        W = W.T.contiguous() if isinstance(linear, Conv1D) else W
        if isinstance(format, Wrapper):
            gram, fisher = torch.eye(W.shape[1]), torch.rand(W.shape, generator=torch.Generator().manual_seed(2))
            stats = Statistics(gram, 1, fisher=fisher.pow(4), max_abs=gram.diagonal())
            matrix = solve(Nearest(), W, stats, format)
        else:
            matrix = nearest_matrix(format, W, fitted(format, W, search=False))
        layer = QuantLinear(format, tuple(W.shape), linear.bias is not None)
        layer._buffers.update(matrix.pack())
        layer.bias = linear.bias
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, layer)
    return model


@torch.no_grad()
def logits(model, tokens: list[int], cache=None, prompt: Tensor = PROMPT) -> tuple[Tensor, object]:
    """Of each token after the prompt, one at a time, and the cache."""
    if cache is None:
        cache = model(input_ids=prompt, use_cache=True).past_key_values
    steps = [model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits[0, -1] for t in tokens]
    return torch.stack(steps), cache


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def is_stepping(model) -> bool:
    """Return True if the compiled step has run and its first results agreed."""
    return None in vars(model)["forward"]._kind_reasons.values()


def both(model, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits by transformers' own forward, and then by the step."""
    expected, _ = logits(model, tokens)
    found, _ = logits(attach(model), tokens)
    return expected, found
