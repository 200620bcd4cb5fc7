"""Rotary embeddings and their inverse, against those of the models."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitmill.errors import UsageError
from bitmill.kv.rope import Rope, attention_modules, find_rope
from helpers.packed_cache import long_model, packed_cache

KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
}


def test_undo_is_inverse():
    rope = Rope(1.0 / torch.arange(1, 9, dtype=torch.float64), factor=1.3)
    x = torch.randn(2, 3, 50, 16)
    positions = torch.arange(50)[None] + torch.tensor([[-7], [100000]])
    torch.testing.assert_close(rope.undo(rope.apply(x, positions), positions), x, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_distance():
    rope = Rope(10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    scores = [
        (rope.apply(q, torch.tensor([[p + 5]])) * rope.apply(k, torch.tensor([[p]]))).sum() for p in (0, 900)
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


def test_gradient():
    rope = Rope(1.0 / torch.arange(1, 5, dtype=torch.float64), factor=1.3)
    x = torch.randn(1, 1, 6, 8, requires_grad=True)
    positions, weight = torch.arange(6)[None], torch.randn(1, 1, 6, 8)
    (rope.apply(x, positions) * weight).sum().backward()
    torch.testing.assert_close(rope.undo_gradient(weight, positions), x.grad, atol=1e-5, rtol=1e-5)


def own_keys(model, layer_type="full_attention"):
    """A layer's rotary embedding as the model applies it, (1, 2, 300, 8), and what went in."""
    attention = attention_modules(model)[0]
    apply_rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    x, positions = torch.randn(1, 2, 300, attention.head_dim), torch.arange(300)[None]
    several = hasattr(model.model.rotary_emb, f"{layer_type}_inv_freq")
    cos, sin = model.model.rotary_emb(x, positions, *([layer_type] if several else []))
    return x, positions, apply_rotary(x, x, cos, sin)[1]


def interleaved(kind: str):
    """A model that rotates pairs of neighbouring channels."""
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 2, "rotary_dim": 16, "n_positions": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).float().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_model_rope(kind):
    model = long_model("llama", rope_parameters=KINDS[kind])
    x, positions, theirs = own_keys(model)
    rope = find_rope(model, attention_modules(model)[0], "full_attention")
    torch.testing.assert_close(rope.apply(x, positions), theirs, atol=2e-4, rtol=1e-3)
    assert (rope.factor != 1) == (kind == "yarn")


def test_gemma_local_and_global():
    model = long_model("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    found = {}
    for number, kind in enumerate(("sliding_attention", "full_attention")):
        rope = find_rope(model, attention_modules(model)[number], kind)
        x, positions, theirs = own_keys(model, kind)
        torch.testing.assert_close(rope.apply(x, positions), theirs, atol=2e-4, rtol=1e-3)
        found[kind] = rope.frequencies
    assert not torch.equal(found["sliding_attention"], found["full_attention"])


@pytest.mark.parametrize(
    "model",
    [
        lambda: long_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        lambda: long_model("phi", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        lambda: long_model("gpt2"),
        lambda: long_model("opt"),
        lambda: interleaved("gptj"),
        lambda: interleaved("codegen"),
    ],
    ids=["dynamic", "partial", "gpt2", "opt", "gptj", "codegen"],
)
def test_unsupported_rope_message(model):
    model = model()
    assert find_rope(model, attention_modules(model).get(0), "full_attention") is None
    with pytest.raises(UsageError, match="no rotary embedding that can be undone"):
        packed_cache(model, ("kvquant", {}))


def test_layers_without_rope():
    cache = packed_cache(long_model("smollm3", no_rope_layers=[1, 0]), ("kvquant", {}))
    assert [layer.buffer.rope is None for layer in cache.packed_layers] == [False, True]
