"""The data of the charts of a comparison."""

from __future__ import annotations

import pytest

from bitmill.report.charts import chart_data, gaussian_divergence
from bitmill.report.results import Layer, Variant
from helpers.sample_results import results, variant


def variant_of(kl: float, errors: list[float | None]) -> Variant:
    """A variant of two layers, the second of twice the weights."""
    made = Variant.model_validate({**variant("rtn", 3, 12.0, blocks=1), "kl_divergence": kl})
    layers = [
        Layer(
            name=f"model.layers.0.{at}", format="uniform", shape=[4 * (at + 1), 8], bits_per_weight=3.0,
            size_bytes=100, weight_error=error, output_error=None,
        )
        for at, error in enumerate(errors)
    ]  # fmt: skip
    return made.model_copy(update={"layers": layers})


def test_gaussian_divergence_is_the_least_per_error():
    one, two = variant_of(0.3, [0.1, 0.4]), variant_of(0.1, [0.2, 0.2])
    assert gaussian_divergence([one]) == pytest.approx(0.3 / 0.3)
    assert gaussian_divergence([one, two]) == pytest.approx(0.1 / 0.2)


def test_no_curve_without_errors():
    assert gaussian_divergence([]) is None
    assert gaussian_divergence([variant_of(0.3, [None, None])]) is None
    assert gaussian_divergence([variant_of(0.0, [0.1, 0.1])]) is None


def test_chart_has_the_curve_below_variants_of_its_error():
    data = chart_data(results())
    assert data["gaussian_divergence"] > 0
