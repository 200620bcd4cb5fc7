"""Options of beam search."""

from __future__ import annotations

import pytest

from bitmill.errors import RecipeError
from bitmill.solvers.beam import BeamSearch


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 0},
        {"sweeps": -1},
        {"rounds": -1},
        {"tolerance": -0.1},
        {"tolerance": float("nan")},
        {"damp": 0.0},
        {"damp": 100.0},
        {"alpha": -0.1},
        {"alpha": 1.1},
    ],
    ids=str,
)
def test_invalid_options_refused(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        BeamSearch(**options)


def test_needs():
    assert BeamSearch().needs == {"gram"}
    assert BeamSearch(alpha=0.5).needs == {"gram", "cross"}
