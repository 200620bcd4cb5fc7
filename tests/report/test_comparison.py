"""Readable renderings of results."""

from __future__ import annotations

import io

from rich.console import Console

from bitmill.report.card import model_card
from bitmill.report.comparison import comparison_table

MEASURED = {"by": "eval", "text": "pydoc", "split": "eval", "seqlen": 512, "windows": 4, "perplexity": 9.25}
REPORT = {
    "bitmill": "0.1.0",
    "source": "org/model",
    "bits_per_weight": 3.375,
    "recipe": {"name": "gptq", "weight": {"format": "uniform", "bits": 3, "group_size": 64}},
    "identity": {"calibration": None},
    "layers": [],
}


def test_table_unknown_values():
    stream = io.StringIO()
    rows = [{"name": "float", "perplexity": 9.25}, {"name": "rtn", "top1_agreement": 0.5, "size_bytes": 2e6}]
    Console(file=stream, width=200).print(comparison_table(rows, "few windows"))
    text = stream.getvalue()
    for word in ("9.250", "50.0%", "2.0 MB", "few windows", "-"):
        assert word in text


def test_card_held_out_text():
    held_out = model_card({**REPORT, "measured": [MEASURED]})
    assert "The text was held out from calibration." in held_out
    assert "base_model: org/model" in held_out
    mixed = model_card({**REPORT, "measured": [MEASURED, {**MEASURED, "split": "all"}]})
    assert "include calibration text" in mixed
    assert mixed.count("| pydoc") == 2
    assert "Nothing was measured" in model_card({**REPORT, "measured": []})
