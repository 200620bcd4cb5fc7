"""The page of packed caches matches its results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_page_matches_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import kv_page

    assert kv_page.PAGE.read_text(encoding="utf-8") == kv_page.page()
