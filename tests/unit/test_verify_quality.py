"""A folder is sound only if a real perplexity was recorded and comes out again."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitmill.checkpoint.verify import verify_quality
from bitmill.errors import CheckpointError


def folder(perplexity: float) -> SimpleNamespace:
    recorded = {"by": "quantize", "text": "pydoc", "split": "eval", "seqlen": 8, "windows": 1}
    return SimpleNamespace(folder=Path("out"), report={"measured": [{**recorded, "perplexity": perplexity}]})


@pytest.mark.parametrize("recorded", [math.nan, math.inf, -math.inf, 0.0, -3.0])
def test_a_perplexity_that_no_model_has_is_refused(recorded):
    with pytest.raises(CheckpointError, match="which no model has"):
        verify_quality(folder(recorded), lambda m: 12.0)


@pytest.mark.parametrize("now", [math.nan, math.inf, 12.1, 0.0])
def test_a_perplexity_that_moved_is_refused(now):
    with pytest.raises(CheckpointError, match="was recorded"):
        verify_quality(folder(12.0), lambda m: now)


def test_a_perplexity_that_stayed_is_sound():
    assert verify_quality(folder(12.0), lambda m: 12.006) == pytest.approx(5e-4)
