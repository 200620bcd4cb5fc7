"""Experts of fused tensors are linear layers: the code of the model gives equal outputs, and tensors come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitmill.architectures.experts import ExpertLinears, expert_of, join_experts, split_experts
from helpers.tiny_models import tiny_model

TOKENS = torch.arange(24).view(2, 12) + 3
MIXTURES = {  # fused alike, transposed with biases, multiplied at once, with dense blocks first
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 32},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_outputs_are_equal(model_type):
    model = tiny_model(model_type, **MIXTURES[model_type])
    expected, tensors = model(TOKENS, use_cache=False).logits, dict(model.state_dict())
    split_experts(model)
    assert any(isinstance(module, ExpertLinears) for module in model.modules())
    assert torch.allclose(model(TOKENS, use_cache=False).logits, expected, atol=1e-5)
    join_experts(model)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.allclose(model(TOKENS, use_cache=False).logits, expected, atol=1e-5)


def test_expert_of():
    assert expert_of("mlp.experts.down_proj.expert12") == ("mlp.experts.down_proj", 12)
    assert expert_of("mlp.experts.12.down_proj") is None


def test_convolutions_stay():
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    split_experts(model)
    assert isinstance(model[0].weight, nn.Parameter)


def test_other_functions_are_refused():
    experts = ExpertLinears(torch.ones(2, 3, 4), transposed=False)
    with pytest.raises(NotImplementedError, match="of the matrix of an expert"):
        torch.exp(experts[0])
