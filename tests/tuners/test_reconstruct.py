"""Reconstruction: learned rounding and scales of inputs, towards the outputs of the float block."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import bitmill
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.tuners import training
from bitmill.tuners.reconstruct import LearnedRounding, Reconstruct
from helpers.cases import weights
from helpers.tiny_models import tiny_vision_model

PICTURES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@cache
def quantized(tuner: Reconstruct | None = None):
    """A tiny classifier at 3 bits, and the change of its logits."""
    model = tiny_vision_model("vit_classifier")
    with torch.no_grad():
        before = model(PICTURES).logits.clone()
        recipe = build_recipe("adalog", {"bits": 3, "act_bits": 4, "log": "uniform", "values": "token"})
        bitmill.quantize(model, replace(recipe, tuners=(tuner,) if tuner else ()), calib=PICTURES, measure=0)
        return model, float((model(PICTURES).logits - before).norm())


@pytest.mark.parametrize("fisher", [False, True])
def test_logits_come_closer_to_float(fisher):
    tuner = Reconstruct(iters=40, rate=0.1, rate_params=3e-3, fisher=fisher)
    assert quantized(tuner)[1] < 0.9 * quantized()[1]


def test_layers_that_read_one_input_keep_equal_scales_of_it():
    model, first = quantized(Reconstruct(iters=40, rate=0.1, rate_params=3e-3))[0], quantized()[0]
    path = "vit.layers.0.attention."
    scales = [model.get_submodule(path + name).input_scale for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[0], scales[2])
    assert not torch.equal(scales[0], first.get_submodule(path + "q_proj").input_scale)


def test_adalog_reconstructs():
    tuner = build_recipe("adalog", {"reconstruct": "fisher", "iters": 7, "minutes": 3.0}).tuners[0]
    assert tuner == Reconstruct(7, 3.0, fisher=True)


@pytest.mark.parametrize(
    "format", [Uniform(3, 40), Uniform(2, "row", True), Uniform(1, "tensor"), Uniform(4, zero="float")]
)
def test_a_rounding_starts_at_the_solvers_codes(format):
    W = weights()
    start = nearest_matrix(format, W, fit_matrix(format, W, None, search=True))
    rounding = LearnedRounding(W, start)
    assert torch.equal(rounding.quantized().codes, start.codes)
    moved = replace(start, codes=(start.codes + 1).clamp(max=(1 << format.bits) - 1))  # as a solver with feedback
    assert torch.equal(LearnedRounding(W, moved).quantized().codes, moved.codes)


def test_time_ends_training(monkeypatch):
    """A clock that advances by ten seconds a look: six minutes for two blocks are 18 looks each."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(training.time, "monotonic", lambda: 10.0 * next(ticks))
    steps: list[float] = []
    monkeypatch.setattr(training, "adam_step", lambda optimizer, share: steps.append(share))
    quantized(Reconstruct(1000, minutes=6.0))
    assert len(steps) == 2 * 17


def test_options_are_checked():
    with pytest.raises(bitmill.errors.RecipeError, match="minutes -1"):
        Reconstruct(minutes=-1)
