"""Block fine-tuning (AQLM, arXiv 2401.06118, section 3.4) on the blocks of a tiny model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.codebook import Codebook
from bitmill.formats.uniform import Uniform
from bitmill.tuners.block_finetune import BlockFinetune
from helpers.tuned_blocks import quantized

LONG = BlockFinetune(epochs=8, tokens=128)  # a tiny text has few steps in it


@pytest.mark.parametrize("format", [Uniform(2, 16), Uniform(3, "row", True), Codebook(2), BinaryCoding(2, 16)])
def test_held_out_divergence_falls(format):
    assert quantized(LONG, format=format)[1] < 0.9 * quantized(format=format)[1]


def test_parameters_beat_norms():
    """AQLM, section 4.3: most of the gain comes from what the layers store."""
    none, norms, params, everything = (
        quantized(*tuner)[1]
        for tuner in ((), *((dataclasses.replace(LONG, which=w),) for w in ("norms", "params", "all")))
    )
    assert params < norms < none
    assert everything < norms


@pytest.mark.parametrize("which", ["all", "norms", "params"])
def test_codes_are_unchanged(which):
    before, after = quantized()[0], quantized(BlockFinetune(which=which))[0]
    old, new = before[0], after[0]  # the second block has other inputs
    for name, layer in old.layers.items():
        tuned = new.layers[name].quantized
        assert torch.equal(tuned.codes, layer.quantized.codes)
        assert torch.equal(tuned.params["zero"], layer.quantized.params["zero"])
        same = torch.equal(tuned.params["scale"], layer.quantized.params["scale"])
        assert same == (which == "norms")
    assert bool(new.changed) == (which != "params")


def test_worse_epochs_discarded():
    before, after = quantized()[0][0], quantized(BlockFinetune(epochs=3, rate=30.0))[0][0]
    assert not after.changed
    for name, layer in before.layers.items():
        for part, values in layer.quantized.params.items():
            assert torch.equal(after.layers[name].quantized.params[part], values)


def test_seed_determines_run():
    first, again, other = (quantized(BlockFinetune(seed=s))[1] for s in (0, 0, 1))
    assert first == again != other


def test_long_windows():
    assert quantized(BlockFinetune(tokens=1))[1] < quantized()[1]
