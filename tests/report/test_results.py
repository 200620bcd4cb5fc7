"""results.json is validated when it is read; tables and charts derived from it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from bitmill.errors import CheckpointError
from bitmill.report import charts, comparison
from bitmill.report.comparison import results_table
from bitmill.report.results import Layer, Results, read_results
from helpers import sample_results


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(sample_results.document()))
    return path


def test_round_trip(file):
    results = read_results(file)
    assert Results.model_validate_json(results.model_dump_json()) == results
    assert {v.status for v in results.variants} == {"done", "not_applicable"}
    assert len(results.done()) == len(results.variants) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d["variants"][0].update(perplexity="low"), r"variants\.0\.perplexity"),
        (lambda d: d["variants"][3].update(perplexity=float("nan")), r"variants\.3\.perplexity"),
        (lambda d: d["variants"][0].update(kl=0.1), r"variants\.0\.kl"),
        (lambda d: d["variants"][0].update(size_bytes=None), r"variants\.0: .*no size_bytes"),
        (lambda d: d["settings"].pop("prompts"), r"settings\.prompts"),
    ],
)
def test_invalid_results_message(file, change, message):
    document = sample_results.document()
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        read_results(file)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, ""])
def test_invalid_json_refused(file, text):
    file.write_text(text)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_results(file)
    file.unlink()
    with pytest.raises(CheckpointError, match="There is no document"):
        read_results(file)


def test_keys_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    schema = Results.model_json_schema()
    described = [schema, *schema["$defs"].values()]
    for name in {key for part in described for key in part["properties"]}:
        assert f"`{name}`" in page, name


def test_row_order():
    results = sample_results.results()
    names = [variant.name for variant in comparison.in_order(results)]
    assert names[:3] == ["gptqt-4bit", "gptq-4bit", "awq-4bit"]
    assert names[-1] == "hqq-2bit"  # not applicable
    best = [variant.name for variant in comparison.best_of_bits(results)]
    assert best == [
        "gptqt-4bit",
        "gptqt-3bit",
        "gptqt-2bit",
    ]


@pytest.mark.parametrize(
    ("grid", "start"),
    [
        (None, "Down to 3\u00a0bits, gptqt stays close to the float model: perplexity 12.67 against 11.23"),
        ({"rtn": (33.0, None, None)}, "No variant stays close to the float model; rtn 4-bit is nearest"),
        ({"rtn": (None, None, None)}, "No variant has been measured yet."),
        ({}, "There are no variants."),
    ],
)
def test_headline(grid, start):
    assert comparison.headline(Results.model_validate(sample_results.document(grid, blocks=1))).startswith(start)


def test_headline_without_float_model():
    assert "the float model not" in comparison.headline(sample_results.results(float=None))


def test_layers_by_block():
    layer = {"format": "uniform", "shape": [2, 2], "bits_per_weight": 3, "size_bytes": 1, "output_error": None}
    names = ["model.layers.0.a.q", "model.layers.0.b.q", "model.layers.10.a.q", "lm_head"]
    layers = [Layer(name=name, weight_error=n / 10, **layer) for n, name in enumerate(names)]
    grid = charts.layer_grid(layers)
    assert grid.rows == ["a.q", "b.q", "lm_head"]
    assert grid.blocks == [0, 10]
    assert grid.values(layers, "weight_error") == [[0.0, 0.2], [0.1, None], [0.3, None]]
    assert charts.short_names(grid.rows) == ["a.q", "b.q", "lm_head"]
    assert charts.short_names(["a.x", "b.y"]) == ["x", "y"]


def test_terminal_table():
    stream = io.StringIO()
    Console(file=stream, width=100).print(results_table(sample_results.results()))
    lines = [line.split() for line in stream.getvalue().splitlines() if re.match(r" (float|\w+-\dbit)", line)]
    assert lines[0][:2] == ["float", "11.230"]
    assert lines[1][:3] == ["gptqt-4bit", "*", "11.620"]
    assert all(len(line) > 1 for line in lines)
    assert "hqq-2bit" not in stream.getvalue()
