"""AutoRound (arXiv 2309.05516): learned rounding beats rounding to nearest, and GPTQ at few bits."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.tuners.autoround import AutoRound
from helpers.tuned_blocks import quantized

LEARNED = AutoRound(tokens=128)


@pytest.mark.parametrize("bits", [2, 3])
def test_beats_nearest(bits):
    format = Uniform(bits, 16)
    assert quantized(LEARNED, format=format)[1] < 0.8 * quantized(format=format)[1]


def test_beats_gptq_at_2_bits():
    """Section 4, table 1: the gap is widest there."""
    assert quantized(LEARNED)[1] < 0.95 * quantized(solver=GPTQ())[1]


def test_more_steps_help():
    few, many = (quantized(AutoRound(iters=n, tokens=128))[1] for n in (5, 80))
    assert many < 0.95 * few


def test_stored_like_nearest():
    plain, learned = quantized()[0][0], quantized(LEARNED)[0][0]
    for name, layer in plain.layers.items():
        ours = learned.layers[name].quantized
        assert ours.format == layer.quantized.format
        assert not torch.equal(ours.codes, layer.quantized.codes)


def test_method_uses_tuner():
    recipe = build_recipe("autoround", {"bits": 2, "iters": 7})
    assert recipe.tuners == (AutoRound(iters=7),)
