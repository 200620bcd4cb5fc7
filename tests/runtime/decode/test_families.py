"""The decode step of every described family against the forward of transformers."""

from __future__ import annotations

import copy

import pytest
import torch

import bitmill
from bitmill.formats import FORMATS
from bitmill.runtime.decode import attach, decode_path, detach, step_cache
from helpers.decoding import PROMPT, both, is_stepping, logits, quantize, relative_error
from helpers.native_kernels import needs_native
from helpers.packed_cache import generated, long_model, packed_cache, prompt
from helpers.tiny_models import tiny_model

pytestmark = needs_native

MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
FAMILIES = [
    ("mistral", {"sliding_window": 10}),
    ("ministral", {"sliding_window": 5, **MIXED}),
    ("seed_oss", {"attention_bias": True}),
    ("ernie4_5", {}),
    ("helium", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, **MIXED}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, **MIXED}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"sliding_window": 10, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}),
    ("gemma2", {"sliding_window": 4, "final_logit_softcapping": None, "attn_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window": 10, "rope_parameters": GEMMA3_ROPE, **MIXED}),
    ("gemma3_text", {"sliding_window": 4, "final_logit_softcapping": 3.0, **MIXED}),
    ("gpt2", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}),
    ("opt", {}),
    ("opt", {"enable_bias": False, "_remove_final_layer_norm": True, "activation_function": "gelu"}),
    ("gpt_neox", HALF),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast", "attention_bias": False}),
    ("phi", HALF),
    ("phi", {"qk_layernorm": True, **HALF}),
    ("phi3", {"sliding_window": None}),
    ("phi3", {"sliding_window": 10, **HALF}),
    ("granite", {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True, **HALF}),
    ("stablelm", {"use_parallel_residual": True, "hidden_act": "gelu_pytorch_tanh", **HALF}),
    ("cohere", {}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    ("cohere2", {"sliding_window": 10, **MIXED}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True}),
    ("olmo3", {"sliding_window": 10, **MIXED}),
    ("glm", {"attention_bias": True, **HALF}),
    ("glm4", HALF),
    ("starcoder2", {"sliding_window": 10}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
]
MIXTURES = FAMILIES[-3:]
TOKENS = [7, 3, 100, 0, 55, 9, 8, 77]
UNIFORM = FORMATS.get("uniform")(4, 16)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")


@pytest.mark.parametrize(("kind", "changes"), FAMILIES, ids=repr)
def test_logits(kind, changes):
    model = tiny_model(kind, **changes)
    expected, found = both(model, TOKENS)
    assert decode_path(model) == "step"
    assert is_stepping(model)
    assert relative_error(found, expected) < 1e-5


LONG_PROMPT = torch.arange(3, 67)[None] * 7 % 101


@pytest.mark.parametrize(("kind", "changes"), FAMILIES, ids=repr)
@torch.no_grad()
def test_prompts(kind, changes):
    found, model = [], tiny_model(kind, **changes)
    for one in (model, attach(copy.deepcopy(model))):
        output, parts = None, []
        for ids in LONG_PROMPT.split(41, 1):
            past = None if output is None else output.past_key_values
            output = one(input_ids=ids, past_key_values=past, use_cache=True)
            parts.append(output.logits[0])
        found.append(torch.cat(parts))
    assert vars(one)["forward"]._prompts == (None,)
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("method", ["rtn", "pvq"])
@pytest.mark.parametrize(("kind", "changes"), MIXTURES, ids=repr)
def test_packed_experts(kind, changes, method):
    model = tiny_model(kind, **changes)
    bitmill.quantize(model, method, bits=4, calib=LONG_PROMPT[:, :32], measure=0)
    expected, found = both(detach(model), TOKENS)
    assert decode_path(model) == "step"
    assert is_stepping(model)
    assert relative_error(found, expected) < 1e-5


def own_logits(model, ids):
    """Of the last token, by transformers without a cache."""
    with torch.no_grad():
        return detach(copy.deepcopy(model))(input_ids=torch.tensor([ids])).logits[0, -1]


WINDOWED = ("gemma3_text", {"sliding_window": 6, "num_hidden_layers": 3})
WINDOWED[1]["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr(step_cache, "MIN_CAPACITY", 2)  # so that memory must grow, and tokens leave it


def test_window_of_a_chat(small_memory):
    model = attach(tiny_model(WINDOWED[0], **WINDOWED[1]))
    ids = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    found, cache = logits(model, ids)
    assert is_stepping(model)
    ids = PROMPT[0].tolist() + ids
    assert relative_error(found[-1], own_logits(model, ids)) < 1e-5
    for question in ([9, 10, 11], list(range(30)), [5]):  # shorter than the window, longer, and one token
        with torch.no_grad():
            answer = model(input_ids=torch.tensor([question]), past_key_values=cache).logits[0, -1]
        ids += question
        assert relative_error(answer, own_logits(model, ids)) < 1e-5
        assert relative_error(logits(model, [12], cache)[0][0], own_logits(model, [*ids, 12])) < 1e-5
        ids.append(12)
    assert [layer.get_seq_length() for layer in cache.layers] == [len(ids)] * 3
    assert cache.layers[0].keys.shape[2] == 5


def test_window_reset_and_crop(small_memory):
    model = attach(tiny_model(WINDOWED[0], **WINDOWED[1]))
    cache = logits(model, TOKENS)[1]
    with pytest.raises(RuntimeError, match="crop"):
        cache.layers[0].crop(-1)
    cache.reset()
    with torch.no_grad():
        model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache)
    assert relative_error(logits(model, [6], cache)[0][0], own_logits(model, [4, 5, 6])) < 1e-5
    cache.crop(-1)
    found = logits(model, [7, 8, 9, 10, 11], cache)[0]
    assert relative_error(found[-1], own_logits(model, [4, 5, 7, 8, 9, 10, 11])) < 1e-5


@torch.no_grad()
def test_window_left_to_transformers(small_memory):
    model = attach(tiny_model(WINDOWED[0], **WINDOWED[1]))
    caches = [logits(model, TOKENS)[1] for _ in range(2)]
    caches[0].batch_repeat_interleave(2)
    for layer in caches[1].layers:
        getattr(layer, "activate_past_recording", int)()
    ids = [*PROMPT[0].tolist(), *TOKENS, 3, 9]
    for cache, rows in zip(caches, (2, 1)):
        model(input_ids=torch.tensor([[3]] * rows), past_key_values=cache)
        found = model(input_ids=torch.tensor([[9]] * rows), past_key_values=cache).logits[-1, -1]
        assert relative_error(found, own_logits(model, ids)) < 1e-5
    caches[1].crop(-2)
    found = model(input_ids=torch.tensor([[3, 9]]), past_key_values=caches[1]).logits[-1, -1]
    assert relative_error(found, own_logits(model, ids)) < 1e-5


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "gpt_neox"])
def test_greedy_text(kind):
    model = quantize(tiny_model(kind, eos_token_id=None, pad_token_id=0), UNIFORM)
    expected = model.generate(PROMPT, max_new_tokens=30, do_sample=False)
    assert torch.equal(attach(model).generate(PROMPT, max_new_tokens=30, do_sample=False), expected)
    assert is_stepping(model)


def test_scaled_embedding_in_bfloat16():
    model = tiny_model("gemma3_text").to(torch.bfloat16)
    own, found = both(model, TOKENS)
    assert is_stepping(model)
    assert vars(model)["forward"]._plan._table is not None
    assert relative_error(found.float(), own.float()) < 0.05


@pytest.mark.parametrize(
    ("kind", "changes"), [("gpt2", {"n_embd": 64}), ("phi", {"hidden_size": 64, "head_dim": 16, **HALF})]
)
def test_packed_cache(kind, changes):
    model = attach(long_model(kind, **changes))
    caches = [packed_cache(model, ("per_token", {"bits": 8})) for _ in range(2)]
    expected = generated(detach(copy.deepcopy(model)), prompt(), caches[0])
    assert generated(model, prompt(), caches[1]) == expected
    assert decode_path(model, caches[1]) == "step"
    assert vars(model)["forward"]._kind_reasons == {caches[1].decode_step_cache().kind: None}


def test_packed_cache_of_windows_refused():
    model = attach(long_model("gemma3_text", hidden_size=64, head_dim=16, sliding_window=40, **MIXED))
    cache = packed_cache(model, ("per_token", {"bits": 8}))
    generated(model, prompt(), cache)
    assert decode_path(model) == "step"
    assert "sliding window" in decode_path(model, cache)
