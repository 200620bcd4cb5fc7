"""QTIP (arXiv 2406.11235): errors are fed on between and inside the blocks of a trellis."""

from __future__ import annotations

import dataclasses

import pytest

from bitmill.formats.trellis import Trellis
from bitmill.recipes.method import build_recipe
from bitmill.solvers.nearest import Nearest
from helpers.rotated_layers import held_out_error


def test_stored_bits() -> None:
    stored = build_recipe("qtip").default.format
    assert stored.stored_bits((576, 1536)) == 576 * (1536 * 2 + 16)


@pytest.mark.parametrize("seed", [0, 1])
def test_feedback_inside_blocks_helps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = held_out_error(seed, "qtip")
    monkeypatch.setattr(Trellis, "feeds_inside", False)
    assert ours < held_out_error(seed, "qtip")


@pytest.mark.parametrize("seed", [0, 1])
def test_feedback_beats_nearest(seed: int) -> None:
    recipe = build_recipe("qtip", {"column_passes": 0})
    assert held_out_error(seed, recipe) < 0.9 * held_out_error(seed, dataclasses.replace(recipe, solver=Nearest()))
