"""A dozen of the causal types of transformers are quantized, loaded and run as they were measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TYPES = (  # hybrids, compressed keys, experts with dense first blocks, parallel blocks, fused projections
    "bamba",
    "bloom",
    "deepseek_v2",
    "falcon_h1",
    "glm4_moe",
    "gpt_neo",
    "jamba",
    "mamba2",
    "nemotron_h",
    "gemma4_text",
    "olmo_hybrid",
    "phi",
    "qwen3_next",
)


@pytest.fixture
def causal_types(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("causal_types")


@pytest.mark.parametrize("name", TYPES)
def test_type_is_right(name, tmp_path, monkeypatch, causal_types):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    row = causal_types.row(name, "rtn", 8, tmp_path)
    assert row["state"] == "right", row


def test_page_keeps_what_is_written_by_hand(causal_types):
    rows = [
        {"type": "a", "state": "refused", "why": "no | blocks"},
        {
            "type": "b",
            "state": "right",
            "share": 1.0,
            "float": [],
            "packed_and_decoded": 0.0,
            "packed_and_float": 0.01,
        },
    ]
    results = {"transformers": "5", "method": "rtn", "bits": 8, "rows": rows}
    page = causal_types.page("before\n<!-- measured:begin -->\nold\n<!-- measured:end -->\nafter\n", results)
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "2 types: 1 refused, 1 right" in page
    assert "old" not in page
