"""The page of the speed benchmarks and its plot match the results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def performance(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import performance

    return performance


def _case(format: str, bits: int, shape: tuple[int, int], time_s: float) -> dict[str, Any]:
    size = bits * shape[0] * shape[1] / 8
    return {
        "kernel": "lut",
        "format": format,
        "bits": bits,
        "group_size": None,
        "shape": list(shape),
        "tokens": 1,
        "bits_per_weight": bits,
        "time_s": time_s,
        "GBps": size / time_s / 1e9,
        "fraction_of_read_bandwidth": size / time_s / 1e10,
        "speedup_vs_torch_fp32": 4e-3 / time_s,
    }


def _kernels() -> dict[str, Any]:
    cases = [_case(name, bits, (64, 128), 1e-3 * bits) for name in ("uniform", "e8") for bits in (2, 4)]
    return {"threads": 2, "isa": None, "activations": "int8", "read_bandwidth_GBps": 10.0, "kernels": cases}


def test_page_matches_results(performance: Any) -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(*performance.results())


def test_page_without_results(performance: Any) -> None:
    page = performance.page(None, [], [])
    assert all(command in page for command in performance.COMMANDS)
    assert "roofline.svg" not in page


@pytest.mark.parametrize("arithmetic", [None, 1e11])
def test_plot_has_every_case(performance: Any, arithmetic: float | None) -> None:
    picture = ElementTree.fromstring(performance.roofline(_kernels(), arithmetic))
    dots = [node for node in picture.iter() if node.get("class", "").startswith("dot")]
    assert len(dots) == 4 + 2  # and one a family in the legend
    width, height = (float(n) for n in picture.get("viewBox", "").split()[2:])
    assert all(0 < float(d.get("cx", 0)) < width and 0 < float(d.get("cy", 0)) < height for d in dots)


def test_no_slower_than_uniform(performance: Any) -> None:
    kernels = _kernels()
    kernels["kernels"] += [_case("codebook", 4, (64, 128), 5e-3)]
    assert "`codebook` 0.80 to 0.80" in performance.page(kernels, [], [])
