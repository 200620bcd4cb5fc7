"""The compiled step on packed caches equals the forward of transformers: tokens, logits and stored bytes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from bitmill import native
from bitmill.errors import UsageError
from bitmill.kv.cache import QuantizedCache
from bitmill.runtime.decode import attach, decode_path, detach
from helpers.decoding import relative_error
from helpers.native_kernels import needs_native
from helpers.packed_cache import continued, generated, long_model, packed_cache, prompt
from helpers.selection import thin

pytestmark = needs_native

KVQUANT = ("kvquant", {"bits": 4, "sink": 2, "residual": 32})
KIVI = ("kivi", {"bits": 4, "group": 16, "residual": 64})
PER_TOKEN = ("per_token", {"bits": 8})
ROTATED = ("rotated", {"bits": 4})
SETTINGS = [KVQUANT, KIVI, PER_TOKEN, ROTATED, ("kvquant", {"bits": 2, "sink": 40, "pre_rope": False})]
MODELS = [
    ("llama", {"head_dim": 16}),
    ("llama", {"hidden_size": 96, "head_dim": 16, "num_attention_heads": 6, "tie_word_embeddings": True}),
    ("qwen2", {"head_dim": 16, "num_key_value_heads": 4}),  # biases
    ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),  # norms of heads
]
PRODUCT = thin(
    [(*model, setting) for model in MODELS for setting in SETTINGS],
    lambda case: case[:2] == MODELS[0] or case[2] == KVQUANT,
)
LONG = {"max_new_tokens": 110, "min_new_tokens": 110}


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")


def model_of(kind="llama", changes=None):
    return long_model(kind, **({"head_dim": 16} if changes is None else changes))


def has_stepped(model, cache):
    kind = cache.decode_step_cache().kind
    return kind != "packed" and vars(model)["forward"]._kind_reasons.get(kind, "no") is None


def stored(cache):
    return [
        (layer.buffer.pages.used_pages(), layer.buffer.fp16_buffer, layer.length) for layer in cache.packed_layers
    ]


@pytest.mark.parametrize(("kind", "changes", "setting"), PRODUCT, ids=str)
def test_greedy_tokens(kind, changes, setting):
    model = model_of(kind, changes)
    expected = generated(model, prompt(), packed_cache(model, setting), **LONG)
    cache = packed_cache(attach(model), setting)
    assert generated(model, prompt(), cache, **LONG) == expected
    assert has_stepped(model, cache)
    assert decode_path(model, cache) == "step"
    assert cache.packed_layers[0].buffer.pages.num_pages >= 2


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_logits_and_bytes(setting):
    """Sums in another order move a key by a unit in the last place of fp16 now and then, and logits by as much."""
    model, ids = model_of(), prompt(1, 160, seed=3)
    own, stepped = packed_cache(model, setting), packed_cache(model, setting)
    fed = packed_cache(model, setting)
    expected = continued(model, own, ids, 160)
    attach(model)
    found, keys = [], []
    for at in range(160):
        found.append(continued(model, stepped, ids[:, at : at + 1], 1))
        waits = [layer.scheme.sink + layer.buffer.num_unpacked - 1 for layer in stepped.packed_layers]
        keys.append(
            [layer.buffer.fp16_buffer[:, :, :, w].clone() for layer, w in zip(stepped.packed_layers, waits)]
        )
    assert has_stepped(model, stepped)
    assert relative_error(torch.cat(found, 1), expected) < 2e-3
    for number, layer in enumerate(fed.packed_layers):  # what the step has put aside, by the ordinary way
        states = torch.stack([k[number].float() for k in keys], -2)
        layer.lazy_initialization(states[0], states[1])
        coders = (layer.buffer.pages.keys, layer.buffer.pages.values)
        assert not any(coder.rotation is not None for coder in coders) or setting == ROTATED
        layer.buffer._to_storage_basis = lambda x: [side.float() for side in x]  # they are in their basis already
        for at in range(160):
            layer.buffer.append(states[0][..., at : at + 1, :], states[1][..., at : at + 1, :])
    for (pages, fp16_buffer, length), (other, theirs, count) in zip(stored(stepped), stored(fed)):
        assert torch.equal(pages, other)
        assert torch.equal(fp16_buffer, theirs)
        assert length == count == 160
    for layer, other in zip(stepped.packed_layers, own.packed_layers):
        assert relative_error(layer.buffer.fp16_buffer.float(), other.buffer.fp16_buffer.float()) < 2e-3
        assert layer.buffer.pages.num_pages == other.buffer.pages.num_pages


def test_equalized_values():
    """By two roundings that leave no choice: what the step stores of given values is what Tokens stores."""
    model = attach(model_of())
    cache, ids = packed_cache(model, KVQUANT), prompt(1, 4)
    seen = []
    projection = model.model.layers[1].self_attn.v_proj
    continued(model, cache, ids, 4)
    assert has_stepped(model, cache)
    layer = cache.packed_layers[1]
    with projection.register_forward_hook(lambda m, i, out: seen.append(out.clone())):  # leaves it to transformers
        copied = copy.deepcopy(cache)
        continued(model, copied, ids, 1)
    continued(model, cache, ids, 1)
    value = seen[0].view(1, 1, 2, 16).transpose(1, 2)
    expected = layer.buffer.pages.values.to_storage_basis(value).half()
    difference = (layer.buffer.fp16_buffer[1, :, :, 2 + 4].float() - expected[:, :, 0].float()).abs()
    assert difference.max() <= 2**-10 * expected.abs().max()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_alternating_paths(setting):
    model, ids = model_of(), prompt(1, 150, seed=4)
    expected = continued(model, packed_cache(model, setting), ids, 150)
    cache, found = packed_cache(model, setting), []
    for at in range(150):
        attach(model) if at % 3 else detach(model)
        found.append(continued(model, cache, ids[:, at : at + 1], 1))
    assert relative_error(torch.cat(found, 1), expected) < 2e-3
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("setting", [KVQUANT, KIVI, ROTATED], ids=str)
def test_crop_save_load(setting, tmp_path):
    model, ids = model_of(), prompt(1, 200, seed=5)
    own = packed_cache(model, setting)
    attach(model)
    cache = packed_cache(model, setting)
    for step in (90, 37, 1, 64):  # into a page, and within what waits
        tail = ids[:, cache.get_seq_length() :]
        found = continued(model, cache, tail, step)
        detach(model)
        expected = continued(model, own, tail, step)
        attach(model)
        assert relative_error(found, expected) < 2e-3
        for one in (cache, own):
            one.crop(-min(step - 1, 40))
    cache = QuantizedCache.load(model, cache.save(tmp_path / "cache.safetensors"))
    tail = ids[:, cache.get_seq_length() :]
    found = continued(model, cache, tail, 30)
    assert has_stepped(model, cache)
    assert relative_error(found, continued(detach(model), own, tail, 30)) < 2e-3


def test_copies_are_independent():
    model = attach(model_of())
    cache, ids = packed_cache(model, KIVI), prompt(1, 100)
    continued(model, cache, ids, 100)
    copied = copy.deepcopy(cache)
    first = continued(model, cache, prompt(seed=6))
    continued(model, copied, prompt(seed=7), 45)
    cache.crop(-20)
    assert torch.equal(continued(model, cache, prompt(seed=6)), first)
    cache.reset()
    assert "empty" in decode_path(model, cache)
    continued(model, cache, ids, 100)
    assert torch.equal(continued(model, cache, prompt(seed=6)), first)


def test_unsupported_calls():
    model = attach(model_of())
    cache = packed_cache(model, KVQUANT)
    assert decode_path(model) == "step"
    assert decode_path(model, cache) == "It decodes by transformers' own forward: the packed cache is empty."
    continued(model, cache, prompt(2), 3)
    assert "several sequences" in decode_path(model, cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert decode_path(model, cache) == "step"
    cache.packed_layers[1].crop(-1)
    assert "different numbers of tokens" in decode_path(model, cache)
    padded = packed_cache(model, KVQUANT)
    mask = torch.ones(1, 50, dtype=torch.int64)
    mask[:, :3] = 0
    with torch.no_grad():
        model(prompt(), attention_mask=mask, past_key_values=padded)
    assert "padding" in decode_path(model, padded)
    other = packed_cache(model_of("llama", {"head_dim": 32}), KIVI)
    continued(model_of("llama", {"head_dim": 32}), other, prompt(), 2)
    assert "another shape" in decode_path(model, other)
    narrow = attach(long_model("llama"))
    cache = packed_cache(narrow, ("per_token", {"bits": 8}))
    continued(narrow, cache, prompt(), 2)
    assert "multiples of 16" in decode_path(narrow, cache)
    cache = packed_cache(model, KIVI)
    continued(model, cache, prompt(), 2)
    model.set_attn_implementation("eager")
    assert "floats" in decode_path(model, cache)
    assert decode_path(model) == "step"


def test_other_attention_falls_back():
    model, ids = model_of(), prompt(1, 60)
    expected = continued(model, packed_cache(model, KVQUANT), ids, 60)
    attach(model)
    cache = packed_cache(model, KVQUANT)
    continued(model, cache, ids, 1)
    for layer in cache.packed_layers:  # what the compiled kernel is told differs from what is stored
        layer.kernel_args._layer = replace(
            layer.kernel_args._layer, value_mean=layer.buffer.pages.values.mean * 30
        )
    assert relative_error(continued(model, cache, ids[:, 1:], 59), expected[:, 1:]) < 2e-3
    assert "with a packed cache the compiled step differs" in decode_path(model, cache)
    assert decode_path(model) == "step"


def block(heads=2, dim=16, room=34, pages=1, words=None):
    library = native.native()
    side = (2 * heads * 2 * 16, heads * dim * 4)
    key = library.KvSide(4, 2, 1, 0, 0, side[0], side[0] + 16, -1, -1)
    begin = side[0] + 32
    value = library.KvSide(4, 2, 1, 0, begin, begin + side[1], begin + side[1] + 16, -1, -1)
    plan = library.KvPages(heads, dim, begin + side[1] + 32, key, value)
    levels = torch.arange(16.0)
    layer = library.KvLayer(plan, levels, levels, None, None, None, 1.0)
    tokens = library.KvTokens(*torch.zeros(2, 1, heads, room, dim, dtype=torch.int16))
    if pages:
        tokens.append(torch.zeros(1, pages, begin + side[1] + 32, dtype=torch.int32))
    return library.KvBlock(layer, tokens, None, None, None, None), layer, tokens


def test_wrong_shapes_refused():
    model = attach(model_of())
    continued(model, packed_cache(model, KIVI), prompt(), 2)
    plan = vars(model)["forward"]._plan
    good = [block()[0] for _ in range(2)]
    cos, sin = plan.angles.at(3)

    def advance(blocks, packed=32, sinks=0, waiting=3, cos=cos):
        logits = torch.empty(plan.tokens)
        start = (torch.zeros(32), None, 1, 1.0, None, cos, sin)
        plan.model.advance(*start, blocks, packed, sinks, waiting, logits, 1)
        return logits

    assert advance(good).isfinite().all()
    assert advance(good, waiting=33).isfinite().all()
    for message, arguments in {
        "no room": (good, 32, 0, 34),
        "past of each block": (good[:1],),
        "fewer pages": (good, 64),
        "fewer fp16": (good, 32, 31, 3),
        "other heads": ([block(1)[0]] * 2,),
        "another size": (good, 32, 0, 3, torch.zeros(1, 15)),
    }.items():
        with pytest.raises(ValueError, match=message):
            advance(*arguments)
    for wrong in ((good, 31), (good, -32), (good, 32, -1), (good, 32, 0, -1), (good, 32, 0, 2**62), ([None] * 2,)):
        with pytest.raises((ValueError, TypeError)):
            advance(*wrong)
    _, layer, tokens = block()
    odd = torch.zeros(15)
    for moves in ((odd, None, None, None), (None, None, torch.zeros(32), None), (None, None, odd, odd)):
        with pytest.raises(ValueError):
            native.native().KvBlock(layer, tokens, *moves)


def test_disabled_with_step(monkeypatch):
    monkeypatch.setenv("BITMILL_DECODE", "off")
    model = attach(model_of())
    assert "no step is attached" in decode_path(model, packed_cache(model, KIVI))
    monkeypatch.setenv("BITMILL_DECODE", "maybe")
    with pytest.raises(UsageError, match="maybe"):
        attach(model)
