"""Prompts through the compiled model against the forward of transformers."""

from __future__ import annotations

import copy

import pytest
import torch

from bitmill.formats import FORMATS
from bitmill.runtime.decode import attach, detach, prompt, step_cache
from helpers.decoding import odd_model, quantize, relative_error
from helpers.native_kernels import needs_native
from helpers.packed_cache import continued, long_model, packed_cache
from helpers.tiny_models import tiny_model

pytestmark = needs_native

IDS = torch.randint(3, 101, (1, 41), generator=torch.Generator().manual_seed(0))
MORE = torch.randint(3, 101, (1, 23), generator=torch.Generator().manual_seed(1))
FORMATS_READ = [
    ("uniform", (4, 16)),
    ("uniform", (8, 16)),  # tables of two bytes
    ("codebook", (3,)),  # levels that are no integers
    ("binary_coding", (2,)),
    ("pyramid", (3,)),
    ("e8", (2,)),
]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")


@torch.no_grad()
def read(model, *prompts, cache=None):
    """Return the logits of prompts that follow one another, and the cache."""
    found = []
    for ids in prompts:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    return torch.cat(found), cache


def reads_prompts(model):
    """Return True if the compiled model has read a prompt."""
    return vars(model)["forward"]._prompts == (None,)


def check(model, *prompts, limit=1e-5):
    expected, _ = read(model, *prompts)
    found, cache = read(attach(model), *prompts)
    assert reads_prompts(model)
    assert relative_error(found, expected) < limit
    return cache


@pytest.mark.parametrize("activations", ["float32", "", "int8"])
@pytest.mark.parametrize(("name", "options"), FORMATS_READ, ids=repr)
def test_formats(name, options, activations, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", activations)
    model = quantize(tiny_model("llama"), FORMATS.get(name)(*options))
    check(model, IDS, MORE, limit=1e-5 if activations == "float32" else 1e-3)


def test_small_pieces(monkeypatch):
    monkeypatch.setattr(prompt, "PIECE_TOKENS", 7)
    monkeypatch.setattr(step_cache, "MIN_CAPACITY", 2)  # so that memory must grow
    cache = check(odd_model(), IDS, MORE)
    assert cache.get_seq_length() == 64


@pytest.mark.parametrize("window", [2, 7, 40, 63, 64])
def test_window(window, monkeypatch):
    monkeypatch.setattr(prompt, "PIECE_TOKENS", 9)
    monkeypatch.setattr(step_cache, "MIN_CAPACITY", 2)
    types = ["sliding_attention", "full_attention"]
    check(tiny_model("qwen2", use_sliding_window=True, sliding_window=window, layer_types=types), IDS, MORE)


def test_tokens_after_a_prompt():
    model = attach(odd_model())
    _, cache = read(model, IDS)
    for one in MORE[:, :5].split(1, 1):
        found, _ = read(model, one, cache=cache)
    expected, _ = read(detach(copy.deepcopy(model)), torch.cat([IDS, MORE[:, :5]], 1))
    assert relative_error(found[-1], expected[-1]) < 1e-5
    cache.reset()
    assert torch.equal(read(model, IDS, cache=cache)[0], read(model, IDS)[0])


@torch.no_grad()
def test_last_logits_only():
    model = attach(odd_model())
    every, _ = read(model, IDS)
    for kept in (1, 3, 41, 100):
        found = model(input_ids=IDS, use_cache=True, logits_to_keep=kept).logits[0]
        assert relative_error(found, every[-kept:]) < 1e-6


@pytest.mark.parametrize(
    "setting", [("kivi", {"bits": 4, "group": 16, "residual": 64}), ("per_token", {"bits": 8})]
)
def test_packed_cache(setting):
    model = long_model("llama", head_dim=16)
    plain = detach(copy.deepcopy(model))
    attach(model)
    caches = [packed_cache(one, setting) for one in (model, plain)]
    for ids in (torch.cat([IDS, MORE], 1), MORE, IDS):
        found, expected = (read(one, ids, cache=cache)[0] for one, cache in zip((model, plain), caches))
        assert relative_error(found, expected) < 1e-4
    assert reads_prompts(model)
    found, expected = (continued(one, cache, MORE, 5) for one, cache in zip((model, plain), caches))
    assert relative_error(found, expected) < 2e-3


@torch.no_grad()
def test_left_padding_left_to_transformers():
    model = odd_model()
    ids, mask = torch.cat([torch.zeros_like(MORE), IDS], 1), torch.ones(1, 64, dtype=torch.int64)
    mask[:, : MORE.shape[1]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = attach(model)(ids, attention_mask=mask, position_ids=positions, use_cache=True).logits[0, -1]
    assert relative_error(found, read(model, IDS)[0][-1]) < 1e-5


def test_kernel_without_pieces():
    model = attach(quantize(tiny_model("llama"), FORMATS.get("additive")(4)))
    read(model, IDS)
    sentence = "Its prompts use transformers' own forward: the kernel of a layer multiplies single tokens only."
    assert vars(model)["forward"]._prompts == (sentence,)


def test_other_results_refused(monkeypatch):
    model = attach(odd_model())
    monkeypatch.setattr("bitmill.runtime.decode.forward.first_difference", lambda *args: float("nan"))
    read(model, IDS)
    assert "differs" in vars(model)["forward"]._prompts[0]


def test_wrong_shapes_refused():
    model = attach(odd_model())
    read(model, IDS)
    plan = vars(model)["forward"]._plan
    rows, (cos, sin) = plan.inputs(IDS, 0)
    past, none = torch.zeros(3, 2, 2, 64, 12), torch.zeros(0, 2, 2, 1, 12)
    good = [rows, cos, sin, past, 0, none, 0, torch.empty(1, plan.tokens), True, 1]
    plan.model.read(*good)
    for place, wrong in [
        (0, rows[:, :-1].contiguous()),
        (0, rows[:0]),
        (1, cos[:-1]),
        (2, sin[..., :-2].contiguous()),
        (3, past[..., :40, :].contiguous()),
        (3, past[:2]),
        (4, 24),
        (4, -1),
        (4, 2**62),
        (7, torch.empty(42, plan.tokens)),
        (7, torch.empty(1, plan.tokens + 1)),
    ]:
        with pytest.raises((ValueError, TypeError)):
            plan.model.read(*good[:place], wrong, *good[place + 1 :])
