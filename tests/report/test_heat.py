"""Heat maps: every layer has a cell, colours follow a common logarithmic scale, figures are exact."""

from __future__ import annotations

import pytest

from bitmill.report.heat import COLOUR_STEPS, HeatScale, error_maps
from bitmill.report.results import Layer
from helpers import sample_results


def layers(error: float, blocks: int = 12, calibrated: bool = True) -> list[Layer]:
    return [Layer.model_validate(entry) for entry in sample_results.layers(error, blocks, calibrated, 0)]


def layer(name: str, error: float | None) -> Layer:
    rest = {"format": "uniform", "shape": [2, 2], "bits_per_weight": 3, "size_bytes": 1, "output_error": None}
    return Layer(name=name, weight_error=error, **rest)


def test_colours_of_one_model():
    outputs, weights = error_maps({"": layers(0.1)})
    assert (outputs.error, weights.error) == ("output_error", "weight_error")
    cells = [cell for kind in outputs.maps[""].kinds for cell in kind.cells]
    assert len(cells) == 12 * 7
    steps = {cell.step for cell in cells}
    assert {0, COLOUR_STEPS} <= steps <= set(range(COLOUR_STEPS + 1))
    (largest,) = [cell for cell in cells if cell.largest]
    assert largest.step == COLOUR_STEPS
    assert largest.text == outputs.maps[""].worst


def test_figures_of_a_kind():
    names = ["model.layers.0.a.q", "model.layers.0.b.k", "model.layers.10.a.q"]
    (drawn,) = error_maps({"": [layer(name, error) for name, error in zip(names, (0.01, 0.04, 0.03))]})
    drawn = drawn.maps[""]
    assert drawn.blocks == [0, 10]
    q, k = drawn.kinds
    assert (q.name, q.values, q.largest, q.block) == ("q", [0.01, 0.03], 0.03, 10)
    assert q.mean == drawn.mean("q") == pytest.approx(0.02)
    assert k.cells[1] is None
    assert k.cells[0].text == drawn.worst == "block 0, k: 0.0400"
    assert drawn.mean("v") is None


def test_models_share_a_scale():
    outputs, weights = error_maps(
        {"fine": layers(0.001), "coarse": layers(0.5), "rtn": layers(0.1, calibrated=False)}
    )
    assert list(outputs.maps) == ["fine", "coarse"]  # the third has no errors of its outputs
    assert list(weights.maps) == ["fine", "coarse", "rtn"]
    steps = {name: [c.step for kind in drawn.kinds for c in kind.cells] for name, drawn in weights.maps.items()}
    assert max(steps["fine"]) < min(steps["coarse"])
    assert weights.kinds == [name.partition(".")[2] for name in sample_results.LINEARS]


def test_models_without_errors():
    assert error_maps({}) == []
    assert error_maps({"": [layer("a.0.q", None)]}) == []
    assert error_maps({"": [layer("a.0.q", 0.0)]}) == []


def test_scale_of_a_single_error():
    (drawn,) = error_maps({"": [layer("a.0.q", 0.1)]})
    assert drawn.scale.ticks() == [(0.0, "0.10")]
    assert drawn.scale.step(0.1) == 0


def test_ticks_of_a_clipped_scale():
    scale = HeatScale(0.001, 10.0, clipped=True)
    places, texts = zip(*scale.ticks())
    assert texts == ("≤ 0.0010", "0.1", "1", "10")
    assert places == pytest.approx((0, 50, 75, 100))
