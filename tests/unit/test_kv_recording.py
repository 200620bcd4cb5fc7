"""Keys and values that calibration learns from."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from bitmill.kv.recording import record
from packed import prompt

HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_windows_of_a_hybrid_know_nothing_of_each_other(architecture, fisher):
    model = tiny_model(architecture, **HYBRIDS[architecture])
    seen = record(model, prompt(tokens=48).repeat(3, 1), fisher).layers
    assert seen[0] is None
    for part in ("keys", "values", *(("key_gradient", "value_gradient") if fisher else ())):
        first, *others = getattr(seen[1], part).split(48)
        assert first.abs().max() > 0
        assert all(torch.equal(first, other) for other in others)
