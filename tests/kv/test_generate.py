"""QuantizedCache in generate() equals a slow cache that dequantizes everything, token by token."""

from __future__ import annotations

import copy

import pytest
import torch

import bitmill
from bitmill import native
from bitmill.errors import UsageError
from bitmill.kv import buffer as buffer_module
from bitmill.kv import layer as layer_module
from bitmill.kv.cache import QuantizedCache
from helpers.native_kernels import needs_native
from helpers.packed_cache import (
    ARCHITECTURES,
    NEW,
    SETTINGS,
    WITHOUT_ROPE,
    continued,
    generated,
    long_model,
    packed_cache,
    padded,
    prompt,
    slow_cache,
)
from helpers.selection import one_of_each, thin

ONE_PER_METHOD = one_of_each(SETTINGS, lambda setting: setting[0])


def agrees(model, setting, ids, mask=None, **options):
    cache = packed_cache(model, setting)
    slow = slow_cache(cache, mask, options.get("num_beams", 1))
    assert generated(model, ids, cache, mask, **options) == generated(model, ids, slow, mask, **options)
    return cache


@pytest.mark.parametrize("setting", ONE_PER_METHOD, ids=str)
def test_greedy(setting):
    cache = agrees(long_model("llama"), setting, prompt(tokens=70))
    assert cache.get_seq_length() == 70 + NEW - 1
    assert all(layer.is_direct for layer in cache.packed_layers)


@pytest.mark.parametrize("setting", thin([SETTINGS[2], SETTINGS[3], SETTINGS[6]], [SETTINGS[3]]), ids=str)
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "temperature": 0.8, "top_k": 20}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_sampling_and_beams(setting, options):
    agrees(long_model("llama"), setting, prompt(2), **options)


@pytest.mark.parametrize("architecture", thin(ARCHITECTURES, list(ARCHITECTURES)[:5]))
@pytest.mark.parametrize("setting", thin([SETTINGS[1], SETTINGS[2], SETTINGS[3]], [SETTINGS[2]]), ids=str)
def test_padded_architectures(architecture, setting):
    model = long_model(architecture, **ARCHITECTURES[architecture])
    if architecture in ("opt", "gpt2") and setting not in WITHOUT_ROPE:
        with pytest.raises(UsageError, match="pre_rope=false"):
            packed_cache(model, setting)
        return
    ids, mask = padded()
    agrees(model, setting, ids, mask)
    agrees(model, setting, ids, mask, num_beams=2)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_padding_does_not_matter(architecture):
    """Of eight bits, which hide that padding shifts the borders of pages."""
    model = long_model(architecture, **ARCHITECTURES[architecture])
    ids, mask = padded()
    together = generated(model, ids, packed_cache(model, SETTINGS[0]), mask)
    for row in range(len(ids)):
        alone = generated(model, ids[row : row + 1, 7 * row :], packed_cache(model, SETTINGS[0]))
        assert together[row][50:] == alone[0][50 - 7 * row :]


def test_eager_attention():
    model = long_model("llama")
    model.set_attn_implementation("eager")
    cache = agrees(model, SETTINGS[3], prompt())
    assert not cache.packed_layers[0].is_direct
    assert "decoded" in cache.unsupported_reason


def test_masks_with_holes():
    """A hidden token in the middle, as after a conversation of several rows."""
    model = long_model("llama")
    ids, mask = prompt(2), torch.ones(2, 50, dtype=torch.int64)
    mask[1, 20:25] = 0
    agrees(model, SETTINGS[0], ids, mask)


def test_chunked_prompt():
    model = long_model("mistral", sliding_window=40)
    ids, mask = padded()
    cache = packed_cache(model, SETTINGS[3])
    slow = slow_cache(cache, mask)
    options = {"prefill_chunk_size": 6}
    assert generated(model, ids, cache, mask, **options) == generated(model, ids, slow, mask, **options)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_assisted_decoding(architecture):
    """A draft that is often wrong: what it proposed is cropped again."""
    model = long_model(architecture, **ARCHITECTURES[architecture])
    torch.manual_seed(3)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.lm_head.weight.add_(torch.randn_like(draft.lm_head.weight) * 0.3)
    plain = generated(model, prompt(), packed_cache(model, SETTINGS[0]))
    assisted = generated(model, prompt(), packed_cache(model, SETTINGS[0]), assistant_model=draft)
    assert assisted == plain
    cache = packed_cache(model, SETTINGS[3])
    generated(model, prompt(), cache, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() >= 50 + NEW - 5


def test_quantized_weights():
    model = long_model("llama", hidden_size=64, head_dim=16)
    bitmill.quantize(model, "rtn", calib=prompt(2, 32), bits=4, group_size=16, measure=0)
    agrees(model, SETTINGS[1], prompt())
    assert bitmill.QuantizedCache is QuantizedCache


def wide_model(**changes):
    return long_model("llama", head_dim=16, **changes)


@needs_native
@pytest.mark.parametrize("setting", ONE_PER_METHOD, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_kernel_equals_decoded(setting, rows, monkeypatch):
    name, options = setting
    setting = name, {**options, **({"group": 16} if "group" in options else {})}
    monkeypatch.delenv("BITMILL_KERNEL")
    model = wide_model()
    ids, mask = padded(rows)
    cache = packed_cache(model, setting)
    expected = generated(model, ids, slow_cache(cache, mask), mask)

    def decoded(*args):
        raise AssertionError("a token was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(buffer_module.TokenBuffer, "read", decoded)
        assert generated(model, ids, cache, mask) == expected
    assert cache.unsupported_reason is None
    copied = copy.deepcopy(cache)
    assert torch.equal(continued(model, copied, prompt(rows), 3), continued(model, cache, prompt(rows), 3))
    layer = cache.packed_layers[1]
    query, first = torch.randn(rows, 4, 16), layer.buffer.start + 3
    torch.testing.assert_close(
        layer.attend(query, 0.3, first),
        layer_module.attend_decoded(layer, query, 0.3, first),
        atol=1e-4,
        rtol=1e-4,
    )


@needs_native
def test_kernel_sliding_window(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL")
    ids, mask = padded()
    for architecture in ("mistral", "gemma3_text"):
        agrees(long_model(architecture, **{**ARCHITECTURES[architecture], "head_dim": 16}), SETTINGS[3], ids, mask)


@needs_native
def test_kernel_unsupported_reason(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL")
    model = long_model("llama")
    cache = packed_cache(model, SETTINGS[0])
    assert cache.unsupported_reason == "The cache is empty."
    generated(model, prompt(), cache)
    assert cache.unsupported_reason == "Heads have 8 numbers; kernels take multiples of 16."
    monkeypatch.setenv("BITMILL_KERNEL", "reference")
    assert "reference" in cache.unsupported_reason


def test_old_extension_falls_back(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setattr(native, "_native", object())
    model = long_model("llama", head_dim=16)
    cache = packed_cache(model, ("kivi", {"bits": 4, "group": 16}))
    generated(model, prompt(), cache)
    assert {layer.unsupported_reason for layer in cache.layers} == {
        "The compiled kernels are older than this bitmill and have no kv_attend; reinstall it."
    }
