"""Reports with fields of another type are refused with the field and its value."""

from __future__ import annotations

import json

import pytest

from bitmill.checkpoint.report_schema import read_report
from bitmill.errors import CheckpointError

LAYER = {"name": "model.layers.0.q", "shape": [4, 8], "weight_error": 0.5, "output_error": None}
MEASURED = {"by": "quantize", "text": "pydoc", "perplexity": 11, "domains": {"prose": {}}}
REPORT = {"layers": [LAYER], "measured": [MEASURED], "recipe": {"name": "rtn"}, "kv": None, "later": [1]}


def read_report_of(folder, report):
    (folder / "report.json").write_text(json.dumps(report))
    return read_report(folder)


def test_report_is_read_as_it_is(tmp_path):
    assert read_report(tmp_path) == {}
    assert read_report_of(tmp_path, REPORT) == REPORT


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        *((key, [32, 32], key) for key in ("recipe", "identity", "kv", "running", "ends", "source")),
        ("layers", {}, "layers"),
        ("layers", [3], "layers.0"),
        *(("layers", [{**LAYER, "shape": shape}], "layers.0.shape") for shape in ([4, 8, 8], [4], [0, 8], "4")),
        ("layers", [{**LAYER, "name": 3}], "layers.0.name"),
        ("layers", [{**LAYER, "output_error": {}}], "layers.0.output_error"),
        ("measured", None, "measured"),
        ("measured", [{**MEASURED, "perplexity": "11"}], "measured.0.perplexity"),
        ("measured", [{**MEASURED, "kl_divergence": {"": ""}}], "measured.0.kl_divergence"),
        ("measured", [{**MEASURED, "text": 3}], "measured.0.text"),
    ],
)
def test_other_types_are_refused(tmp_path, key, value, place):
    with pytest.raises(CheckpointError, match=f"is damaged: {place}"):
        read_report_of(tmp_path, {**REPORT, key: value})
