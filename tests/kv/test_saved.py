"""Damaged or forged files of packed caches are refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitmill.errors import CheckpointError
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.codec import calibrated_shapes
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import kv_method
from helpers.packed_cache import SETTINGS, both_sides, calibration_for, long_model, method_of, packed_cache, prompt


def altered(path, change=lambda tensors, meta: None):
    """The file as an earlier version wrote it, without a digest, after `change` of its tensors and metadata."""
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    data = json.loads(meta["bitmill_kv_cache"])
    meta["bitmill_kv_cache"] = json.dumps({k: v for k, v in data.items() if k not in ("xxh3", "version")})
    change(tensors, meta)
    save_file(tensors, path.with_name("altered.safetensors"), metadata=meta)
    return path.with_name("altered.safetensors")


def saved(model, setting, path, tokens=100):
    cache = packed_cache(model, setting)
    with torch.no_grad():
        model(prompt(1, tokens), past_key_values=cache)
    return cache.save(path / "cache.safetensors")


def test_flipped_bit_refused(tmp_path):
    model = long_model("llama")
    path = saved(model, ("per_token", {"bits": 4}), tmp_path)
    assert QuantizedCache.load(model, altered(path)).get_seq_length() == 100  # of an earlier version
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # of the last tensor
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its digest differs"):
        QuantizedCache.load(model, path)


@pytest.mark.parametrize("heads", [3, 5])  # indices of one byte, and of two
@pytest.mark.parametrize("side", ["key", "value"])
def test_outlier_channel_out_of_range(heads, side, tmp_path):
    model = long_model(
        "llama", num_attention_heads=heads, num_key_value_heads=heads, head_dim=64, hidden_size=64 * heads
    )
    setting = ("kvquant", {"bits": 3, "channel_levels": False, "key_outliers": 0.02, "residual": 0})
    part = PageLayout(kv_method("kvquant", **setting[1]).scheme(), heads, 64).parts[f"{side}.outlier_index"]
    path = saved(model, setting, tmp_path)
    assert QuantizedCache.load(model, path).get_seq_length() == 100

    def beyond(tensors, meta):
        part.view(tensors["layers.1.pages"])[0, 2, 0, 31] = heads * 64

    with pytest.raises(CheckpointError, match=f"Layer 1 .* outlier in channel {heads * 64}"):
        QuantizedCache.load(model, altered(path, beyond))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"length": "100"}, "has the metadata"),
        ({"length": 100.0}, "has the metadata"),
        ({"heads": True}, "has the metadata"),
        ({"dim": None}, "has the metadata"),
        ({"dtype": "int8"}, "has the metadata"),
        ({"dtype": "load"}, "has the metadata"),
        ({"heads": 1, "dim": 16}, "1 heads of 16 numbers"),
        ({"heads": 10**9}, "1000000000 heads"),
        ({"first": 1, "length": 101}, "contradicts its pages"),
        ({"first": -32, "length": 68}, "contradicts its pages"),
        ({"first": 96, "length": 196}, "contradicts its pages"),
        ({"length": 95}, "contradicts its pages"),
        ({"length": 140}, "contradicts its pages"),
        ({"length": -1}, "contradicts its pages"),
    ],
    ids=str,
)
def test_invalid_positions_refused(change, fragment, window, tmp_path):
    model = long_model("mistral", sliding_window=window)
    path = saved(model, ("per_token", {"bits": 4}), tmp_path)
    assert QuantizedCache.load(model, path).get_seq_length() == 100
    if window and change.get("first") == 96:
        change = {**change, "length": 100}

    def other(tensors, meta):
        data = json.loads(meta["bitmill_kv_cache"])
        data["layers"][1] |= change
        meta["bitmill_kv_cache"] = json.dumps(data)

    with pytest.raises(CheckpointError, match=f"Layer 1 .*{fragment}"):
        QuantizedCache.load(model, altered(path, other))


@pytest.mark.parametrize("name", ["pages", "loose", "start"])
def test_wrong_dtype_refused(name, tmp_path):
    model = long_model("llama")
    path = saved(model, ("per_token", {"bits": 4}), tmp_path)
    for change in (
        lambda x: x.to(torch.int64 if name == "start" else torch.float32),
        lambda x: x[None],
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
        lambda x: x[..., :0],
    ):

        def other(tensors, meta, change=change):
            tensors[f"layers.1.{name}"] = change(tensors[f"layers.1.{name}"]).contiguous()

        with pytest.raises(CheckpointError, match=r"Layer 1 .* another shape"):
            QuantizedCache.load(model, altered(path, other))


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[0] == "kvquant"], ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_wrong_calibration_refused(setting, side):
    model, method = long_model("llama"), method_of(setting)
    good = calibration_for(model, method)
    QuantizedCache(model, method, calibration=good)
    found = good.layers[1][side]
    scheme = method.scheme()
    names = set(calibrated_shapes((scheme.keys, scheme.values)[side], 16, method.uses_gradients))
    for part in fields(found):
        there = part.name in names
        for value in (None, torch.ones(16, 3)) if there else (torch.ones(16),):
            sides = list(good.layers[1])
            sides[side] = replace(found, **{part.name: value})
            with pytest.raises(CheckpointError, match=f"{part.name} of the .* of layer 1"):
                QuantizedCache(model, method, calibration=replace(good, layers=(good.layers[0], tuple(sides))))
    with pytest.raises(CheckpointError, match="1 layers were calibrated"):
        QuantizedCache(model, method, calibration=replace(good, layers=good.layers[:1]))
    wide = replace(good, layers=tuple(both_sides(scheme, 32) for _ in good.layers))
    if names:
        with pytest.raises(CheckpointError, match="is needed"):
            QuantizedCache(model, method, calibration=wide)
