"""Bits of keys and values of each layer: stored, counted, decoded by the compiled step, saved."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.scheme import kv_method
from bitmill.kv.size import layer_cache_size
from bitmill.models.kv_shapes import CachedLayer
from bitmill.runtime.decode import attach, decode_path
from helpers.native_kernels import needs_native
from helpers.packed_cache import generated
from helpers.tiny_models import tiny_model

OPTIONS = {"base": "per_token", "pairs": "8/4 2/2"}


def test_layers_have_their_bits():
    method = kv_method("kvtuner", base="kivi", pairs="8/4 3*4/2")
    bits = [(scheme.keys.bits, scheme.values.bits) for scheme in map(method.layer_scheme, range(4))]
    assert bits == [(8, 4), (4, 2), (4, 2), (4, 2)]
    assert kv_method("kvtuner", 2).layer_scheme(7) == kv_method("kivi", 2).scheme()
    with pytest.raises(RecipeError, match="pairs has 4 layers, and the model has more"):
        method.layer_scheme(4)


@pytest.mark.parametrize("pairs", ["8", "5/4", "8/4,4/4", "0*8/4", "9999*8/4"])
def test_other_pairs_are_refused(pairs):
    with pytest.raises(RecipeError, match="write bits of keys / bits of values"):
        kv_method("kvtuner", pairs=pairs)


def test_calibrated_bases_are_refused():
    with pytest.raises(RecipeError, match="without calibration"):
        kv_method("kvtuner", base="kvquant")


def test_bytes_are_those_of_the_layers():
    model, method = tiny_model("llama"), kv_method("kvtuner", **OPTIONS)
    cache = QuantizedCache(model, method)
    with torch.no_grad():
        model(torch.randint(3, 100, (1, 70)), past_key_values=cache)
    layer = CachedLayer(model.config.num_key_value_heads, model.config.head_dim)
    sizes = [
        layer_cache_size(method, layer, 1, 70, scheme=method.layer_scheme(number)).allocated for number in range(2)
    ]
    assert [own.allocated_bytes for own in cache.packed_layers] == sizes
    assert sizes[0] > sizes[1]


@needs_native
def test_step_reads_layers_of_different_widths(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    ids = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama", head_dim=16, max_position_embeddings=512)
    expected = generated(model, ids, QuantizedCache(model, "kvtuner", **OPTIONS), max_new_tokens=60)
    cache = QuantizedCache(attach(model), "kvtuner", **OPTIONS)
    assert generated(model, ids, cache, max_new_tokens=60) == expected
    assert decode_path(model, cache) == "step"
    assert cache.packed_layers[0].buffer.pages.num_pages >= 2


def test_saved_cache(tmp_path):
    model = tiny_model("llama")
    cache = QuantizedCache(model, "kvtuner", **OPTIONS)
    with torch.no_grad():
        model(torch.randint(3, 100, (1, 70)), past_key_values=cache)
    again = QuantizedCache.load(model, cache.save(tmp_path / "cache.safetensors"))
    for one, two in zip(cache.packed_layers, again.packed_layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)


@pytest.mark.parametrize("pairs", ["8/4", "9*8/4"])
def test_pairs_of_another_number_of_layers(pairs):
    with pytest.raises(RecipeError, match=r"pairs has \d layers, and the model has"):
        QuantizedCache(tiny_model("llama"), "kvtuner", pairs=pairs)
