"""Budgets of measured time."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.errors import CalibrationError, UsageError
from bitmill.formats import FORMATS
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.method import build_recipe
from bitmill.workflows.budget import latency
from bitmill.workflows.budget.latency import LatencyTable, layer_seconds
from bitmill.workflows.budget.size import parse_budget
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (10, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def times(monkeypatch):
    """A machine that takes a microsecond for each bit of a weight's code, 10 for a layer in float."""
    asked = []

    def seconds(format, shape, tokens):
        asked.append((format, shape, tokens))
        return 10e-6 if format is None else 1e-6 * format.core.rate

    monkeypatch.setattr(latency, "layer_seconds", seconds)
    return asked


def to_budget(budget, **options):
    methods = [build_recipe("rtn", {"bits": bits, "group_size": 16}) for bits in (2, 4, 8)]
    given = {"methods": methods, "corrections": 0, "calib": WINDOWS, "progress": False, "dry_run": True}
    return bitmill.quantize(tiny_model("llama"), budget=budget, **{**given, **options})


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [("40ms prompts of 512", 0.04, 512), ("1.5 s prompt of 64 tokens", 1.5, 64), ("25 tokens/s", 0.04, 1)],
)
def test_forms(text, seconds, tokens):
    budget = parse_budget(text)
    assert (float(budget.seconds), budget.tokens) == (seconds, tokens)
    assert parse_budget(budget.text) == budget


@pytest.mark.parametrize("text", ["40ms", "40ms prompts", "0ms prompts of 5", "0 tokens/s", "1s prompts of 0"])
def test_other_forms_are_refused(text):
    with pytest.raises(UsageError, match=r"^The budget is .*\.$"):
        parse_budget(text)


def test_plan_keeps_the_time(times):
    # 14 layers: 28 us at 2 bits, 112 at 8
    budget = to_budget("0.06ms prompts of 32").summary["budget"]
    assert 0.05e-3 < budget["linear_time_s"] <= 0.06e-3
    assert budget["float_linear_time_s"] == pytest.approx(140e-6)
    assert budget["plans"][0]["linear_time_s"] == budget["linear_time_s"]
    assert {tokens for _, _, tokens in times} == {32}
    assert len(times) == len(set(times))  # equal layers are timed once


def test_more_time_never_costs_more(times):
    kl = [to_budget(f"{us / 1000}ms prompts of 32").summary["budget"]["predicted_kl"] for us in (30, 60, 100)]
    assert kl == sorted(kl, reverse=True)


def test_table_is_kept(times):
    to_budget("0.06ms prompts of 32")
    before = len(times)
    text = str(to_budget("0.05ms prompts of 32"))
    assert len(times) == before
    assert "ms for 32 tokens by their kernels" in text
    to_budget("12000 tokens/s")
    assert {tokens for _, _, tokens in times[before:]} == {1}


@pytest.mark.parametrize(
    ("budget", "message"),
    [("0.001ms prompts of 32", "is below the"), ("1s prompts of 32", "holds the float model, which has 0.00014")],
)
def test_refused(budget, message, times):
    with pytest.raises(UsageError, match=message):
        to_budget(budget)


PARTS = [
    FORMATS.from_dict({"format": "uniform", "bits": 4, "group_size": 16}),
    find_recipe("w4a8").default.format,
    find_recipe("quip", {"bits": 2}).default.format,
    None,
]


@pytest.mark.parametrize("format", PARTS, ids=["uniform", "rounded inputs", "rotated", "float"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_is_timed(format, tokens, monkeypatch):
    monkeypatch.setattr(latency, "copies_of", lambda size: 2)
    assert layer_seconds(format, (64, 128), tokens, turns=2) > 0


def test_table_names_the_machine(monkeypatch):
    monkeypatch.setattr(latency, "copies_of", lambda size: 2)
    table = LatencyTable(2)
    seconds = table.seconds(PARTS[0], (32, 64))
    again = LatencyTable(2)
    assert again.seconds(PARTS[0], (32, 64)) == seconds
    assert (table.measured, again.measured) == (1, 0)
    assert set(table.machine) == {"cpu", "threads", "isa", "activations"}
    table.file.write_text('{"seconds": {"a": "fast"}}')
    with pytest.raises(CalibrationError, match="holds no times of layers; delete it"):
        LatencyTable(2)
