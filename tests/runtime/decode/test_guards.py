"""The decode step is not used for models and calls that it does not support."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from bitmill.formats import FORMATS
from bitmill.formats.quantized import SHARED
from bitmill.runtime.decode import attach, decode_path, detach
from bitmill.runtime.decode.forward import StepForward
from bitmill.runtime.decode.guard import ModelGuard
from bitmill.runtime.modules.dequantize import dequantize_model
from helpers.decoding import ODD, PROMPT, is_stepping, logits, odd_model, quantize, relative_error
from helpers.native_kernels import needs_native
from helpers.tiny_models import tiny_model

pytestmark = needs_native

TOKENS = [7, 3, 100, 0, 55]
UNIFORM = FORMATS.get("uniform")(4, 16)
FOREIGN = [
    ("arcee", {}),
    ("ministral3", {"sliding_window": None}),
    ("olmo", {}),
]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")


@pytest.fixture
def model():
    return attach(odd_model())


def own_logits(model, tokens=TOKENS):
    """By transformers' own forward."""
    return logits(detach(copy.deepcopy(model)), tokens)[0]


def primed(model, tokens=TOKENS):
    """A cache of a model that steps."""
    cache = logits(model, tokens)[1]
    assert is_stepping(model)
    return cache


@pytest.mark.parametrize(("kind", "changes"), FOREIGN, ids=[kind for kind, _ in FOREIGN])
def test_other_architectures_refused(kind, changes):
    model = tiny_model(kind, **{**ODD, "eos_token_id": None, **changes})
    expected = logits(model, TOKENS)[0]
    assert "is no class that the compiled step was written for" in decode_path(attach(model))
    model.forward = StepForward(model)  # as if it had been attached
    assert torch.equal(logits(model, TOKENS)[0], expected)
    assert "is no class" in decode_path(model)


def test_derived_classes_refused(model):
    class Mine(LlamaForCausalLM):
        pass

    class OtherMLP(LlamaMLP):
        pass

    assert "Mine of " in decode_path(attach(Mine(model.config)))
    primed(model)
    model.model.layers[1].mlp.__class__ = OtherMLP
    assert "OtherMLP of " in decode_path(model)
    model.model.layers[1].mlp.__class__ = LlamaMLP
    assert decode_path(model) == "step"


def test_shared_parts(model):
    model.add_module(SHARED, nn.Module())
    assert decode_path(model) == "step"
    model.add_module("score", nn.Linear(42, 2))
    assert "its modules are not those of a LlamaForCausalLM" in decode_path(model)


def test_plan_errors_refuse(model):
    primed(model)
    del model.model.layers[1].input_layernorm.weight
    assert "AttributeError" in decode_path(model)


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"])
def test_hooks_are_called(model, path):
    cache, called = primed(model), []
    part = model.get_submodule(path)
    for register in (part.register_forward_hook, part.register_forward_pre_hook):
        handle = register(lambda *_: called.append(1))
        logits(model, [9, 8], cache)
        assert len(called) == 2
        assert "hooks" in decode_path(model)
        handle.remove()
        called.clear()
    logits(model, [9], cache)
    assert is_stepping(model)
    assert decode_path(model) == "step"


def test_patched_forward_detected(model):
    primed(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: 0 * LlamaMLP.forward(mlp, x)
    found = logits(model, TOKENS)[0]
    assert torch.equal(found, logits(detach(model), TOKENS)[0])


@pytest.mark.parametrize(
    "name", ["model.norm", "lm_head", "model.layers.1.self_attn.k_proj", "model.embed_tokens"]
)
def test_replaced_parameters(model, name):
    primed(model)
    part = model.get_submodule(name)
    part.weight = nn.Parameter(part.weight.detach() * 3 + torch.randn_like(part.weight))
    found = logits(model, TOKENS)[0]
    assert is_stepping(model)
    assert relative_error(found, own_logits(model)) < 1e-5


@torch.no_grad()
def test_functional_call(model):
    other = {"model.norm.weight": torch.randn(42)}
    answers = []
    for one in (detach(copy.deepcopy(model)), model):
        call = {"input_ids": torch.tensor([[9]]), "past_key_values": logits(one, TOKENS)[1]}
        answers.append(functional_call(one, other, (), call).logits)
    assert relative_error(answers[1], answers[0]) < 1e-5
    assert relative_error(logits(model, TOKENS)[0], own_logits(model)) < 1e-5


def test_copied_parameters_watched():
    model = attach(odd_model("qwen2").to(torch.bfloat16))
    primed(model)
    for part in (
        model.model.norm.weight,
        model.model.layers[0].self_attn.q_proj.bias,
        model.model.rotary_emb.inv_freq,
    ):
        with torch.no_grad():
            part.mul_(torch.rand_like(part) * 3)
        found = logits(model, TOKENS)[0]
        assert is_stepping(model)
        assert relative_error(found.float(), own_logits(model).float()) < 0.03


@torch.no_grad()
def test_config_output_flags(model):
    cache = primed(model)
    model.config.output_hidden_states = True
    output = model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    assert len(output.hidden_states) == 4
    assert "config requests more" in decode_path(model)
    model.config.output_hidden_states, model.config.return_dict = False, False
    assert "config requests more" in decode_path(model)
    model.config.return_dict = True
    assert decode_path(model) == "step"  # though transformers leaves its hooks in place, which do nothing now


def test_dropout_falls_back(model):
    primed(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert "training mode" in decode_path(model)
    first, second = (logits(model, TOKENS)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert decode_path(model.eval()) == "step"


def test_refusals_are_temporary():
    model = attach(odd_model().to(torch.float16))
    logits(model, TOKENS)
    assert "holds torch.float16" in decode_path(model)
    found = logits(model.float(), TOKENS)[0]
    assert is_stepping(model)
    assert relative_error(found, own_logits(model)) < 1e-5
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().T.contiguous().T)
    assert "lm_head is not contiguous" in decode_path(model)


def test_unpacked_models():
    model = attach(quantize(odd_model(), UNIFORM))
    primed(model)
    found = logits(dequantize_model(model), TOKENS)[0]
    assert decode_path(model) == "step"
    assert relative_error(found, own_logits(model)) < 1e-5


def test_shallow_copy(model):
    other = copy.copy(model)
    primed(other)
    assert torch.equal(logits(other, TOKENS)[0], logits(model, TOKENS)[0])


@torch.no_grad()
def test_other_masks_fall_back(model):
    masks = {"full_attention": torch.zeros(1, 1, 1, PROMPT.shape[1] + len(TOKENS) + 1)}
    call = {"input_ids": torch.tensor([[9]]), "past_key_values": primed(model), "attention_mask": masks}
    try:
        expected = detach(copy.deepcopy(model))(**copy.deepcopy(call)).logits
    except Exception as error:
        with pytest.raises(type(error)):
            model(**call)
        return
    assert relative_error(model(**call).logits, expected) < 1e-5


def test_unknown_tokens_raise(model):
    cache = primed(model)
    with pytest.raises(IndexError):
        logits(model, [101], cache)
    assert relative_error(logits(model, [9], cache)[0], own_logits(model, [*TOKENS, 9])[-1:]) < 1e-5


def test_custom_embedding():
    model = quantize(odd_model(), UNIFORM)
    model.model.embed_tokens.half()
    expected = logits(model, TOKENS)[0]
    found = logits(attach(model), TOKENS)[0]
    assert is_stepping(model)
    assert vars(model)["forward"]._plan._table is None
    assert relative_error(found, expected) < 2e-3


def test_cache_changes_mode(model):
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        with first():
            cache = model(input_ids=PROMPT, use_cache=True).past_key_values
            for token in TOKENS:
                model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        with second():
            found = model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache).logits[0, -1]
        assert is_stepping(model)
        assert relative_error(found, own_logits(model, [*TOKENS, 1, 2])[-1]) < 1e-5


@torch.no_grad()
def test_reset_cache_with_batch(model):
    cache = primed(model)
    cache.reset()
    two = torch.cat([PROMPT, PROMPT.flip(1)])
    found = model(input_ids=two, past_key_values=cache).logits
    assert relative_error(found, detach(copy.deepcopy(model))(input_ids=two).logits) < 1e-5
    assert cache.layers[0].keys.shape[0] == 2


def test_cache_snapshots(model):
    cache = primed(model)
    view = cache.layers[1].keys
    before = view.clone()
    logits(model, list(range(60)), cache)
    assert torch.equal(view, before)
    cache.crop(-62)
    logits(model, [90, 91], cache)
    assert torch.equal(view[:, :, :-2], before[:, :, :-2])


def test_early_exit_detected(model):
    guard = ModelGuard(model)
    assert guard.is_current()
    assert guard.blocking_reason() is None
    model.config.num_hidden_layers -= 1
    assert "number of blocks" in guard.blocking_reason()
