"""EfficientQAT (arXiv 2407.11062) on the blocks of a tiny model: its claims, and what it stores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitmill.formats.codebook import Codebook
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.tuners.block_ap import BlockAP
from helpers.tuned_blocks import quantized, quantized_by

LONG = BlockAP(epochs=6, tokens=128, rate=1e-2)  # a tiny text has few steps in it
GRID = {"bits": 2, "group_size": 16}


def test_below_gptq_on_its_grid():
    found = quantized_by(build_recipe("efficientqat", {**GRID, "epochs": 8, "tokens": 128, "rate": 1e-2}))[1]
    assert found < 0.8 * quantized_by(build_recipe("gptq", GRID))[1]


def test_weights_with_scales_and_zeros_are_best():
    """The paper's ablation, table 6: all of them together beat weights alone, and those scales and zeros."""
    found = {w: quantized(dataclasses.replace(LONG, which=w))[1] for w in ("all", "weights", "params")}
    assert found["all"] < 0.95 * found["weights"]
    assert found["weights"] < found["params"] < quantized()[1]


@pytest.mark.parametrize("which", ["all", "weights", "params"])
def test_what_changes(which):
    before = quantized()[0][0]
    after = quantized(BlockAP(epochs=2, tokens=128, rate=1e-2, which=which))[0][0]
    assert not after.changed
    codes = scales = False
    for name, layer in before.layers.items():
        old, new = layer.quantized, after.layers[name].quantized
        codes |= not torch.equal(old.codes, new.codes)
        scales |= not torch.equal(old.params["scale"], new.params["scale"])
        assert bool((new.params["zero"] == new.params["zero"].round()).all())
    assert codes
    assert scales == (which != "weights")


@pytest.mark.parametrize("format", [Uniform(3, 16, symmetric=True), Codebook(2)], ids=repr)
def test_other_formats_and_solvers(format):
    assert quantized(LONG, format=format, solver=GPTQ())[1] < quantized(format=format, solver=GPTQ())[1]


def test_worse_states_discarded():
    before, after = quantized()[0][0], quantized(BlockAP(epochs=1, rate=30.0, rate_params=30.0))[0][0]
    for name, layer in before.layers.items():
        assert torch.equal(after.layers[name].quantized.codes, layer.quantized.codes)
