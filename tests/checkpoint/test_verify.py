"""Verification recomputes the recorded perplexity of a folder."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitmill.checkpoint import verify as module
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify_quality
from bitmill.errors import CheckpointError


def folder(value: float, key: str = "perplexity") -> SimpleNamespace:
    recorded = {"by": "quantize", "text": "pydoc", "split": "eval", "seqlen": 8, "windows": 1}
    return SimpleNamespace(folder=Path("out"), report={"measured": [{**recorded, key: value}]})


@pytest.mark.parametrize("recorded", [math.nan, math.inf, -math.inf, 0.0, -3.0])
def test_impossible_perplexity(recorded):
    with pytest.raises(CheckpointError, match="which no model has"):
        verify_quality(folder(recorded), lambda m: {"perplexity": 12.0})


@pytest.mark.parametrize("now", [math.nan, math.inf, 12.1, 0.0])
def test_changed_perplexity_refused(now):
    with pytest.raises(CheckpointError, match="was recorded"):
        verify_quality(folder(12.0), lambda m: {"perplexity": now})


def test_equal_perplexity_accepted():
    assert verify_quality(folder(12.0), lambda m: {"perplexity": 12.006}) == ("perplexity", pytest.approx(5e-4))


def test_encoder_metric_tolerance():
    """A mean cosine may be 0, so that nothing is relative to it."""
    again = {"pair_cosine": 0.0004}
    assert verify_quality(folder(0.0, "pair_cosine"), lambda m: again) == ("pair_cosine", pytest.approx(4e-4))
    with pytest.raises(CheckpointError, match=r"cosine of two sentences 0\.2020 where 0\.2000"):
        verify_quality(folder(0.2, "pair_cosine"), lambda m: {"pair_cosine": 0.202})
    with pytest.raises(CheckpointError, match="which no model has"):
        verify_quality(folder(1.5, "pair_cosine"), lambda m: again)


def test_kernels_of_the_device(written, monkeypatch):
    """Kernels are compared on the device that is asked for, with the weights as the CPU decodes them."""
    seen = []

    def disagreement(spec, tensors, W):
        seen.append({spec.device.type, *(tensor.device.type for tensor in tensors.values())})
        assert W.device.type == "cpu"

    monkeypatch.setattr(module, "disagreement", disagreement)
    module.verify(open_checkpoint(written), device="meta")
    assert seen == [{"meta"}] * len(seen) != []
