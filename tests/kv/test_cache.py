"""QuantizedCache without generate(): saved, converted, copied, rows selected, and the model's own cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

from bitmill.errors import CheckpointError, UsageError
from bitmill.kv.cache import QuantizedCache
from bitmill.recorded_tensors import read_recorded, write_recorded
from bitmill.runtime.decode import attach, decode_path
from helpers.native_kernels import needs_native
from helpers.packed_cache import (
    ARCHITECTURES,
    SETTINGS,
    continued,
    generated,
    long_model,
    packed_cache,
    padded,
    prompt,
    slow_cache,
)
from helpers.selection import one_of_each


def test_attention_can_change():
    model = long_model("llama")
    cache = packed_cache(model, SETTINGS[0])
    model.set_attn_implementation("sdpa")
    expected = packed_cache(model, SETTINGS[0])
    assert model.config._attn_implementation == "bitmill"
    model.set_attn_implementation("sdpa")
    assert generated(model, prompt(), cache) == generated(model, prompt(), slow_cache(expected))


def test_bfloat16():
    model = long_model("llama").bfloat16()
    cache = packed_cache(model, SETTINGS[3])
    assert generated(model, prompt(), cache) == generated(model, prompt(), packed_cache(model, SETTINGS[3]))
    assert cache.packed_layers[0].keys.dtype == torch.bfloat16
    copied = copy.deepcopy(cache)
    direct = continued(model, cache, prompt(seed=1), 1)
    model.set_attn_implementation("sdpa")
    copied.packed_layers[0].config._attn_implementation = "sdpa"
    rounded = continued(model, copied, prompt(seed=1), 1)
    assert (direct - rounded).norm() < 0.05 * rounded.norm()
    fresh = packed_cache(model, SETTINGS[3])
    model.set_attn_implementation("sdpa")
    assert generated(model, prompt(), fresh) == generated(model, prompt(), slow_cache(fresh))


@needs_native
def test_dynamic_cache_unchanged():
    model = attach(long_model("llama"))
    before = generated(model, prompt(), DynamicCache(config=model.config))
    assert decode_path(model) == "step"
    cache = packed_cache(model, SETTINGS[1])
    generated(model, prompt(), cache)
    assert decode_path(model) == "step"
    own = DynamicCache(config=model.config)
    assert generated(model, prompt(), own) == before
    assert type(own.layers[0]).__name__ == "KVBufferLayer"  # the compiled step took it over


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_from_dynamic_cache(architecture):
    model = long_model(architecture, **ARCHITECTURES[architecture])
    ids, mask = padded()
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=own)
    taken = packed_cache(model, SETTINGS[0]).take(own, mask)
    written = packed_cache(model, SETTINGS[0])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=written)
    assert [layer.get_mask_sizes(1) for layer in taken.layers] == [
        layer.get_mask_sizes(1) for layer in written.layers
    ]
    for a, b in zip(taken.layers, written.layers):
        own_mask = mask[:, a.first_visible(0) :].bool()[:, None, :, None]
        difference = (a.keys - b.keys).masked_fill(~own_mask, 0).abs()
        assert difference.max() < 0.1  # other numbers share a range after padding


@pytest.mark.parametrize("setting", one_of_each(SETTINGS, lambda setting: setting[0]), ids=str)
def test_saved_and_loaded(setting, tmp_path):
    model = long_model("mistral", sliding_window=40)
    cache, ids = packed_cache(model, setting), prompt(2, 400)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    loaded = QuantizedCache.load(model, cache.save(tmp_path / "cache.safetensors"))
    assert loaded.method == cache.method
    assert loaded.allocated_bytes == cache.allocated_bytes
    assert torch.equal(continued(model, loaded, prompt(2)), continued(model, cache, prompt(2)))
    with pytest.raises(CheckpointError, match="1"):
        QuantizedCache.load(long_model("mistral", num_hidden_layers=1), tmp_path / "cache.safetensors")
    with pytest.raises(CheckpointError, match="another shape"):
        QuantizedCache.load(model, cut_short(tmp_path / "cache.safetensors"))
    (tmp_path / "cache.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        QuantizedCache.load(model, tmp_path / "cache.safetensors")


def cut_short(path):
    short = path.with_name("short.safetensors")
    tensors, about = read_recorded(path, "bitmill_kv_cache", ())
    tensors["layers.0.pages"] = tensors["layers.0.pages"][..., :-1].contiguous()
    write_recorded(short, "bitmill_kv_cache", tensors, about)
    return short


def test_select_and_repeat_rows():
    model = long_model("llama")
    ids, mask = padded()
    cache = packed_cache(model, SETTINGS[3])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    whole = cache.layers[0].keys
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.layers[0].keys, whole[[2, 0]])
    assert cache.layers[0].buffer.start.tolist() == [14, 0]
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, whole[[2, 2, 0, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.allocated_bytes == 0
    assert cache.bits_per_element == 0
    assert generated(model, ids, cache, mask) == generated(model, ids, packed_cache(model, SETTINGS[3]), mask)


def test_copies_are_independent():
    model = long_model("llama")
    cache, ids = packed_cache(model, SETTINGS[2]), prompt(1, 100)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    copied = copy.deepcopy(cache)
    first = continued(model, copied, prompt())
    continued(model, cache, prompt(seed=5), 3)
    assert cache.get_seq_length() == 103
    cache.crop(-3)
    assert torch.allclose(continued(model, cache, prompt()), first, atol=1e-4)


def test_saved_config_attention(tmp_path):
    model = long_model("llama")
    packed_cache(model, SETTINGS[0])
    model.save_pretrained(tmp_path)
    assert "bitmill" not in (tmp_path / "config.json").read_text()


def test_method_required():
    model = long_model("llama")
    with pytest.raises(UsageError, match="method"):
        QuantizedCache(model)
    with pytest.raises(UsageError, match="needs a calibration"):
        QuantizedCache(model, "kvquant")
