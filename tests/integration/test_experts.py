"""Mixtures of experts are quantized by every kind of method, loaded and run as they were measured."""

from __future__ import annotations

import pytest
import torch

import bitmill
from architectures.test_experts import MIXTURES
from bitmill.errors import UsageError
from bitmill.report.experts import expert_coverage
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(7))
TOKENS = torch.arange(24).view(2, 12) + 3
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
DEEPSEEK |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
ALL = {**MIXTURES, "deepseek_v3": DEEPSEEK}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "gptqt", "pvq"])
@pytest.mark.parametrize("model_type", ALL)
def test_quantized_loaded_and_saved(model_type, method, tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    options = {"bits": 4, "calib": WINDOWS, "measure": 0}
    tiny_model(model_type, **ALL[model_type]).save_pretrained(tmp_path / "float")
    outcome = bitmill.quantize(tmp_path / "float", method, out=tmp_path / "packed", **options)
    packed = bitmill.load(tmp_path / "packed")
    quantized = [layer["name"] for layer in outcome.report["layers"]]
    assert sum("expert" in name for name in quantized) >= 8
    dense = bitmill.load(tmp_path / "packed", dense=True)
    float_model = tiny_model(model_type, **ALL[model_type])
    assert dense.state_dict().keys() == float_model.state_dict().keys()
    assert torch.allclose(logits(packed), logits(dense), atol=1e-3)
    bitmill.quantize(float_model, method, **options)
    assert torch.equal(logits(float_model), logits(packed))
    packed.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(bitmill.load(tmp_path / "copy")), logits(packed))


@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_experts_without_tokens(propagate, tmp_path):
    """Windows of one word reach few of eight experts."""
    tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1).save_pretrained(tmp_path / "float")
    options = {"bits": 4, "calib": torch.full((2, 8), 5), "measure": 0, "propagate": propagate}
    outcome = bitmill.quantize(tmp_path / "float", "gptq", out=tmp_path / "packed", **options)
    coverage = expert_coverage(outcome.report["layers"])
    assert [row["experts"] for row in coverage] == [8] * 4
    assert all(row["without"] > 0 and row["least"] == 0 for row in coverage)
    assert f"| 8 | 0 | 0 | {coverage[0]['without']} |" in (tmp_path / "packed" / "README.md").read_text()
    assert bool(torch.isfinite(logits(bitmill.load(tmp_path / "packed"))).all())


@pytest.mark.parametrize("method", ["squeezellm", "autoround", "omniquant", "efficientqat"])
def test_learning_methods_without_tokens(method):
    """Gradients are absent for experts that no token was sent to."""
    model = tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1)
    outcome = bitmill.quantize(model, method, bits=4, calib=torch.full((2, 8), 5), measure=0)
    assert sum("expert" in layer["name"] for layer in outcome.report["layers"]) == 2 * 2 * 8
    assert bool(torch.isfinite(logits(model)).all())


def test_rule_for_a_fused_tensor():
    model = tiny_model("mixtral", **MIXTURES["mixtral"])
    with pytest.raises(UsageError, match=r"several matrices; write '\*\.gate_up_proj\.\*' for all"):
        bitmill.quantize(model, "rtn", bits=4, measure=0, rules=["*.gate_up_proj=float"])
    layers = bitmill.quantize(model, "rtn", bits=4, measure=0, rules=["*.gate_up_proj.*=float"]).report["layers"]
    assert not any("gate_up_proj" in layer["name"] for layer in layers)
