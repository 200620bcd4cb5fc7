"""Adapters match the models that transformers builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM
from transformers.pytorch_utils import Conv1D

from bitmill.architectures.adapter import adapter_for, generic_adapter
from bitmill.architectures.experts import split_experts
from bitmill.errors import SourceError
from bitmill.models.block_call import output_fn
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from helpers.tiny_models import TEXT_ADAPTERS, tiny_config, tiny_model

NAMES = TEXT_ADAPTERS
TOKENS = torch.arange(24).view(2, 12) + 3


def linear_names(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def inputs_seen(block: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].clone()})
        )
        for name in linear_names(block)
    ]
    model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_each_linear_in_one_stage(name):
    model = tiny_model(name)
    adapter = adapter_for(model.config)
    for block in model.get_submodule(adapter.blocks):
        assert sorted(adapter.linears) == sorted(linear_names(block))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_stage_inputs_and_order(name):
    model = tiny_model(name)
    adapter = adapter_for(model.config)
    seen = inputs_seen(model.get_submodule(adapter.blocks)[0], model)
    ran = list(seen)
    for stage in adapter.stages:
        assert set(ran[: len(stage)]) == set(stage)
        ran = ran[len(stage) :]
        for other in stage[1:]:
            assert torch.equal(seen[stage[0]].reshape(-1), seen[other].reshape(-1))


@pytest.mark.parametrize("name", NAMES)
def test_named_modules_exist(name):
    model = tiny_model(name)
    adapter = adapter_for(model.config)
    block = model.get_submodule(adapter.blocks)[0]
    for group in adapter.fused:
        assert set(group) <= set(adapter.linears)
    for seam in adapter.seams:
        block.get_submodule(seam.source)
        assert set(seam.targets) <= set(adapter.linears)
    for path in (*adapter.embeddings, adapter.head):
        model.get_submodule(path)


def scale_rows(module: nn.Module, scale: torch.Tensor, plus_one: bool) -> None:
    """Multiply output channel c of a norm or a linear by scale[c]."""
    weight = module.weight.data
    if weight.dim() == 2:
        weight.mul_(scale[:, None])
    elif plus_one:
        weight.copy_((1 + weight) * scale - 1)
    else:
        weight.mul_(scale)
    if getattr(module, "bias", None) is not None:
        module.bias.data.mul_(scale)


def scale_columns(module: nn.Module, scale: torch.Tensor, head_dim: int) -> None:
    """Multiply input channel c of a linear by scale[c], repeating heads when it reads more channels."""
    weight = module.weight.data
    if isinstance(module, Conv1D):
        weight.mul_(scale[:, None])
        return
    repeats = weight.shape[1] // len(scale)
    weight.mul_(scale.view(-1, head_dim).repeat_interleave(repeats, 0).reshape(-1) if repeats > 1 else scale)


CASES = [(name, {}) for name in NAMES] + [
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"activation_function": "gelu"}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("bert", {"hidden_act": "relu"}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
@torch.no_grad()
def test_seams_are_exact(name, changes):
    model = tiny_model(name, **changes)
    adapter = adapter_for(model.config)
    before = output_fn(model)(TOKENS)
    generator = torch.Generator().manual_seed(1)
    for block in model.get_submodule(adapter.blocks):
        for seam in adapter.seams:
            source = block.get_submodule(seam.source)
            channels = source.weight.shape[0]
            scale = torch.rand(channels, generator=generator) * 2 + 0.5
            scale_rows(source, 1 / scale, seam.norm_plus_one)
            for target in seam.targets:
                scale_columns(block.get_submodule(target), scale, getattr(model.config, "head_dim", channels))
    after = output_fn(model)(TOKENS)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_invalid_seams_left_out():
    whole = adapter_for(tiny_config("opt"))
    assert len(whole.seams) == 4
    post_norm = adapter_for(tiny_config("opt", do_layer_norm_before=False))
    assert {s.kind for s in post_norm.seams} == {"linear"}
    assert "fc1" not in [s.source for s in adapter_for(tiny_config("opt", activation_function="gelu")).seams]


def test_encoder_seams():
    assert [s.source for s in adapter_for(tiny_config("bert")).seams] == ["attention.self.value"]
    assert len(adapter_for(tiny_config("bert", hidden_act="relu")).seams) == 2


def test_encoder_with_head_refused():
    model = BertForMaskedLM(tiny_config("bert"))
    with pytest.raises(SourceError, match=r"BertForMaskedLM has no blocks at 'encoder.layer'.*AutoModel\.$"):
        StreamedModel(ModuleSource(model))


def test_adapter_for_unknown_architecture_is_none():
    assert adapter_for(tiny_config("bloom")) is None


def test_generic_adapter():
    model = tiny_model("llama")
    named, found = adapter_for(model.config), generic_adapter(model, model.config)
    assert found.blocks == named.blocks
    assert found.stages == tuple((name,) for name in linear_names(model.model.layers[0]))
    for field in ("embeddings", "head"):
        assert getattr(found, field) == getattr(named, field)
    assert found.seams == ()
    assert found.name == "generic:llama"


def test_generic_adapter_finds_outer_list():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    assert generic_adapter(Model()).blocks == "blocks"


def test_generic_adapter_no_blocks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))

    with pytest.raises(SourceError, match=r"Model has no list of blocks.*norms \(3\)"):
        generic_adapter(Model())
    with pytest.raises(SourceError, match=r"Linear has no list.*no nn.ModuleList"):
        generic_adapter(nn.Linear(2, 2))


def test_generic_adapter_experts():
    model = split_experts(tiny_model("mixtral", num_local_experts=4))
    experts = [f"mlp.experts.{name}.expert{n}" for name in ("gate_up_proj", "down_proj") for n in range(4)]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert generic_adapter(model, model.config).linears == (*attention, *experts)


def test_generic_adapter_leaves_routers_in_float():
    model = split_experts(tiny_model("qwen2_moe", num_experts=4, decoder_sparse_step=1))
    linears = generic_adapter(model, model.config).linears
    assert "mlp.shared_expert.up_proj" in linears
    assert "mlp.shared_expert_gate" not in linears


def test_generic_adapter_unequal_blocks():
    model = tiny_model("llama")
    model.model.layers[1].extra = nn.Linear(4, 4)
    assert generic_adapter(model, model.config).linears[-1] == "extra"
