"""QuantizedCache in generate(), token by token the same as a slow cache that dequantizes everything."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import needs_native
from packed import SETTINGS, WITHOUT_ROPE, long_model, packed_cache, slow_cache
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

from bitmill import load, quantize
from bitmill.errors import CheckpointError, UsageError
from bitmill.kv import layer as layer_module
from bitmill.kv.cache import QuantizedCache
from bitmill.runtime.decode import attach, decode_path

NEW = 45
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 40, "attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "opt": {},
    "gpt2": {},
}


def prompt(rows=1, tokens=50, seed=0):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(rows=3, tokens=50):
    ids, mask = prompt(rows, tokens), torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        mask[row, : 7 * row], ids[row, : 7 * row] = 0, 0
    return ids, mask


def generated(model, ids, cache, mask=None, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options).tolist()


def agrees(model, setting, ids, mask=None, **options):
    cache = packed_cache(model, setting)
    slow = slow_cache(cache, mask, options.get("num_beams", 1))
    assert generated(model, ids, cache, mask, **options) == generated(model, ids, slow, mask, **options)
    return cache


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_greedy(setting):
    cache = agrees(long_model("llama"), setting, prompt(tokens=70))
    assert cache.get_seq_length() == 70 + NEW - 1
    assert all(layer.is_direct for layer in cache.packed_layers)


@pytest.mark.parametrize("setting", [SETTINGS[2], SETTINGS[3], SETTINGS[6]], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "temperature": 0.8, "top_k": 20}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_sampling_and_beams(setting, options):
    agrees(long_model("llama"), setting, prompt(2), **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[2], SETTINGS[3]], ids=str)
def test_architectures_with_padding(architecture, setting):
    model = long_model(architecture, **ARCHITECTURES[architecture])
    if architecture in ("opt", "gpt2") and setting not in WITHOUT_ROPE:
        with pytest.raises(UsageError, match="pre_rope=false"):
            packed_cache(model, setting)
        return
    ids, mask = padded()
    agrees(model, setting, ids, mask)
    agrees(model, setting, ids, mask, num_beams=2)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_padded_row_is_like_the_row_alone(architecture):
    """Of eight bits, which hide that padding shifts the borders of pages."""
    model = long_model(architecture, **ARCHITECTURES[architecture])
    ids, mask = padded()
    together = generated(model, ids, packed_cache(model, SETTINGS[0]), mask)
    for row in range(len(ids)):
        alone = generated(model, ids[row : row + 1, 7 * row :], packed_cache(model, SETTINGS[0]))
        assert together[row][50:] == alone[0][50 - 7 * row :]


def test_eager_attention_decodes():
    model = long_model("llama")
    model.set_attn_implementation("eager")
    cache = agrees(model, SETTINGS[3], prompt())
    assert not cache.packed_layers[0].is_direct
    assert "decoded" in cache.why_not


def test_attention_may_change_under_a_cache():
    model = long_model("llama")
    cache = packed_cache(model, SETTINGS[0])
    model.set_attn_implementation("sdpa")
    expected = packed_cache(model, SETTINGS[0])
    assert model.config._attn_implementation == "bitmill"
    model.set_attn_implementation("sdpa")
    assert generated(model, prompt(), cache) == generated(model, prompt(), slow_cache(expected))


def test_masks_with_holes():
    """A hidden token in the middle, as after a conversation of several rows."""
    model = long_model("llama")
    ids, mask = prompt(2), torch.ones(2, 50, dtype=torch.int64)
    mask[1, 20:25] = 0
    agrees(model, SETTINGS[0], ids, mask)


def test_a_prompt_in_chunks():
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


def test_bfloat16():
    model = long_model("llama").bfloat16()
    cache = packed_cache(model, SETTINGS[3])
    assert generated(model, prompt(), cache) == generated(model, prompt(), packed_cache(model, SETTINGS[3]))
    assert cache.packed_layers[0].keys.dtype == torch.bfloat16
    twin = copy.deepcopy(cache)
    direct = continued(model, cache, prompt(seed=1), 1)
    model.set_attn_implementation("sdpa")
    twin.packed_layers[0].config._attn_implementation = "sdpa"
    rounded = continued(model, twin, prompt(seed=1), 1)
    assert (direct - rounded).norm() < 0.05 * rounded.norm()
    fresh = packed_cache(model, SETTINGS[3])
    model.set_attn_implementation("sdpa")
    assert generated(model, prompt(), fresh) == generated(model, prompt(), slow_cache(fresh))


def test_quantized_weights(tmp_path):
    model = long_model("llama", hidden_size=64, head_dim=16)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    quantize(str(folder), recipe="rtn", out=tmp_path / "out")
    agrees(load(str(tmp_path / "out")), SETTINGS[1], prompt())


def wide_model(**changes):
    return long_model("llama", head_dim=16, **changes)


@needs_native
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_kernel_agrees_and_nothing_is_decoded(setting, rows, monkeypatch):
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
        patch.setattr(layer_module.QuantizedLayer, "read", decoded)
        assert generated(model, ids, cache, mask) == expected
    assert cache.why_not is None
    layer = cache.packed_layers[1]
    query, first = torch.randn(rows, 4, 16), layer.start + 3
    torch.testing.assert_close(
        layer.attend(query, 0.3, first),
        layer_module.read_by_floats(layer, query, 0.3, first),
        atol=1e-4,
        rtol=1e-4,
    )


@needs_native
def test_windows_in_the_kernel(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL")
    ids, mask = padded()
    for architecture in ("mistral", "gemma3_text"):
        agrees(long_model(architecture, **{**ARCHITECTURES[architecture], "head_dim": 16}), SETTINGS[3], ids, mask)


@needs_native
def test_why_no_kernel_takes_it(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL")
    model = long_model("llama")
    cache = packed_cache(model, SETTINGS[0])
    assert cache.why_not == "Nothing is packed yet."
    generated(model, prompt(), cache)
    assert cache.why_not == "Heads have 8 numbers; kernels take multiples of 16."
    monkeypatch.setenv("BITMILL_KERNEL", "reference")
    assert "reference" in cache.why_not


@needs_native
def test_the_models_own_cache_is_served_as_before():
    model = attach(long_model("llama"))
    before = generated(model, prompt(), DynamicCache(config=model.config))
    assert decode_path(model) == "step"
    cache = packed_cache(model, SETTINGS[1])
    generated(model, prompt(), cache)
    assert decode_path(model) == "step"
    own = DynamicCache(config=model.config)
    assert generated(model, prompt(), own) == before
    assert type(own.layers[0]).__name__ == "PastLayer"  # the compiled step took it over


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_taken_from_an_ordinary_cache(architecture):
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
        own_mask = mask[:, a.first_for(0) :].bool()[:, None, :, None]
        difference = (a.keys - b.keys).masked_fill(~own_mask, 0).abs()
        assert difference.max() < 0.1  # other numbers share a range after padding


def continued(model, cache, ids, steps=20):
    logits = []
    with torch.no_grad():
        for step in range(steps):
            mask = torch.ones(ids.shape[0], cache.get_seq_length() + 1, dtype=torch.int64)
            logits.append(model(ids[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
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
        QuantizedCache.load(long_model("mistral"), tmp_path / "cache.safetensors") if False else wrong(
            tmp_path, model
        )
    (tmp_path / "cache.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        QuantizedCache.load(model, tmp_path / "cache.safetensors")


def cut_short(path):
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["layers.0.pages"] = tensors["layers.0.pages"][..., :-1].contiguous()
    save_file(tensors, path.with_name("short.safetensors"), metadata=meta)
    return path.with_name("short.safetensors")


def test_rows_are_chosen_and_repeated():
    model = long_model("llama")
    ids, mask = padded()
    cache = packed_cache(model, SETTINGS[3])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    whole = cache.layers[0].keys
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.layers[0].keys, whole[[2, 0]])
    assert cache.layers[0].start.tolist() == [14, 0]
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, whole[[2, 2, 0, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.allocated_bytes == 0
    assert cache.bits_per_element == 0
    assert generated(model, ids, cache, mask) == generated(model, ids, packed_cache(model, SETTINGS[3]), mask)


def test_copies_go_their_own_way():
    model = long_model("llama")
    cache, ids = packed_cache(model, SETTINGS[2]), prompt(1, 100)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    twin = copy.deepcopy(cache)
    first = continued(model, twin, prompt())
    continued(model, cache, prompt(seed=5), 3)
    assert cache.get_seq_length() == 103
    cache.crop(-3)
    assert torch.allclose(continued(model, cache, prompt()), first, atol=1e-4)


def test_the_models_files_do_not_name_our_attention(tmp_path):
    model = long_model("llama")
    packed_cache(model, SETTINGS[0])
    model.save_pretrained(tmp_path)
    assert "bitmill" not in (tmp_path / "config.json").read_text()


def test_a_method_must_be_said():
    model = long_model("llama")
    with pytest.raises(UsageError, match="method"):
        QuantizedCache(model)
    with pytest.raises(UsageError, match="needs a calibration"):
        QuantizedCache(model, "kvquant")
