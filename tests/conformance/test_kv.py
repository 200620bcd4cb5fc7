"""Laws of KV methods, for every registered method."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.kv.codec import TensorCodec
from bitmill.kv.kernel_args import page_plan
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import Rope
from bitmill.kv.scheme import KV_METHODS, kv_method
from bitmill.runtime.attention.dispatch import unsupported_reason
from helpers.packed_cache import calibrated_by, generated, long_model, packed_cache, padded, slow_cache
from helpers.selection import thin

CARD = ("Problem", "Equation", "Stored", "Needs", "Expect", "Paper")
HEADS, DIM = 2, 64
every_method = pytest.mark.parametrize("name", KV_METHODS.names())


def widths(name):
    """The bits that a method takes."""
    found = []
    for bits in (2, 3, 4, 8):
        try:
            kv_method(name, bits)
            found.append(bits)
        except RecipeError:
            continue
    return found


def numbers(tokens=96, seed=0):
    """Keys and values (2, 1, heads, tokens, dim) with a few channels of keys that are large."""
    states = torch.randn(2, 1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    states[0, :, :, :, 3] += 12
    return states


def calibrated(method, states):
    sides = (method.scheme().keys, method.scheme().values)
    return tuple(
        calibrated_by(side, x.transpose(1, 2).flatten(2)[0]) for side, x in zip(sides, states, strict=True)
    )


def layer_of(method, states):
    rope = Rope(10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)))
    scheme = method.scheme()
    if scheme.pre_rope:
        positions = torch.arange(states.shape[-2])[None]
        states = torch.stack([rope.undo(states[0], positions), states[1]])
    return QuantizedLayer(scheme, calibrated(method, states), rope if scheme.pre_rope else None)


@every_method
def test_card_is_complete(name):
    card = KV_METHODS.get(name).__doc__
    assert re.match(r".+\.\n\n", card), "a first sentence, then the card"
    for line in CARD:
        assert re.search(rf"^ +{line} {{2,}}\S", card, re.MULTILINE), f"the card of {name} has no {line!r}"


@every_method
def test_dict_round_trip(name):
    method = kv_method(name)
    assert KV_METHODS.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(method) == hash(kv_method(name))
    for option in dataclasses.fields(method):
        assert option.metadata, option.name


@every_method
def test_unknown_options_refused(name):
    with pytest.raises(RecipeError, match="nonsense"):
        kv_method(name, nonsense=1)
    with pytest.raises(RecipeError):
        kv_method(name, 7)


@every_method
def test_more_bits_lower_error(name):
    states, errors, sizes = numbers(32 * 8), [], []
    for bits in widths(name):
        layer = layer_of(kv_method(name, bits), states)
        layer.append(*states)
        layer.append(*numbers(layer.scheme.residual, 1)) if layer.scheme.residual else None
        kept = 32 * 8
        found = torch.stack([layer.keys, layer.values])[..., :kept, :]
        errors.append(float((found - states).square().mean()))
        sizes.append(layer.buffer.pages.layout.words)
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert len(errors) >= 2
    assert errors[-1] < 0.05


@every_method
@pytest.mark.parametrize("bits", [2, 4])
def test_page_overhead(name, bits):
    """Of 32 heads of 128 numbers, as in a large model."""
    layout = PageLayout(kv_method(name, bits).scheme(), 32, 128)
    assert bits <= layout.words * 32 / (2 * 32 * 32 * 128) <= bits + 1.01


@every_method
def test_kernel_accepts_pages(name):
    for bits in widths(name):
        plan = page_plan(PageLayout(kv_method(name, bits).scheme(), 3, 64))
        reason = unsupported_reason(plan, torch.device("cpu"))
        assert reason is None or "installed" in reason


@every_method
def test_pages_are_independent(name):
    method, states = kv_method(name), numbers(96)
    for which, side in enumerate((method.scheme().keys, method.scheme().values)):
        coder = TensorCodec.from_params(side, HEADS, DIM, calibrated(method, states)[which])
        x = states[which].transpose(1, 2).flatten(2)
        whole = coder.decode(coder.encode(x))
        assert torch.equal(whole[:, 32:64], coder.decode(coder.encode(x[:, 32:64])))


@every_method
@pytest.mark.parametrize("beams", thin([1, 2], [2]))
def test_equals_slow_cache(name, beams):
    model = long_model("llama", head_dim=32, hidden_size=128)
    ids, mask = padded(2)
    for bits in widths(name)[:2]:
        cache = packed_cache(model, (name, {"bits": bits}))
        slow = slow_cache(cache, mask, beams)
        tokens = generated(model, ids, cache, mask, num_beams=beams)
        assert tokens == generated(model, ids, slow, mask, num_beams=beams)
