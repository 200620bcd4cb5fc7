"""Programs that write figures into the README: they replace their own block, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_blocks_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("measured", "tour", "cost"):
        assert readme.index(f"<!-- {name}:begin -->\n") < readme.index(f"\n<!-- {name}:end -->")


def test_excerpt_of_the_screen():
    from tour import COMMANDS, Shown, page, with_excerpt

    output = "model   m\nmethod  pvq (chosen)\nsize  8 MB\n\ndomain  windows\ncode    8  7.20\nmean    8  7.20"
    shown = [Shown(command, output, 0.5, 60.0) for command in COMMANDS]
    text = with_excerpt("before\n<!-- tour:begin -->\nold\n<!-- tour:end -->\nafter", shown)
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    assert "They take 3.0 minutes" in text
    assert "method  pvq (chosen)\ndomain  windows\nmean    8  7.20" in text
    assert "model   m" not in text
    assert page(shown).count("$ bitmill") == 3


def test_duration():
    from cost import duration

    assert [duration(seconds) for seconds in (2.34, 42.3, 130, 7000)] == ["2.3 s", "42 s", "2 min", "1.9 h"]


def test_windows_and_table_of_quality():
    from quality import windows_of, with_table

    names = ("documentation", "prose", "encyclopedia", "dialogue", "code")
    domains = {name: {"kl_divergence": 0.1} for name in names}
    suite = {"kl_divergence": 0.1, "domains": domains, "perplexity_ratio": 1.1, "top1_agreement": 0.8}
    row = {
        "tool": "bitmill",
        "recipe": {"name": "rtn", "weight": {"bits": 3}},
        "calibration": None,
        "bits_per_weight": 3.3,
        "size_bytes": 10**7,
        "figures": {"suite": suite},
    }
    read = {**row, "calibration": {"samples": 32}, "recipe": {"name": "gptq", "weight": {"bits": 3}}}
    other = {**row, "recipe": {"name": "gptq", "weight": {"bits": 4}}}
    peer = {"tool": "hqq", "settings": "without calibration", "bits": 3}
    assert [windows_of(each) for each in (row, read, peer)] == ["-", "32", "-"]
    document = {"rows": [row, read, other], "texts": {"suite": {"windows": {"code": 8}}}}
    readme = with_table("<!-- measured:begin -->\nold\n<!-- measured:end -->", {"tiny": document})
    assert "32 windows of text calibrated, 8 of each" in readme
    assert "`rtn`, 3 bits" in readme
    assert "4 bits" not in readme
