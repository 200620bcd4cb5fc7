"""Bits of weights and of inputs chosen together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bitmill
from bitmill.errors import UsageError
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.inputs import parse_inputs
from bitmill.recipes.method import build_recipe
from bitmill.sensitivities import inputs as sensitivity
from bitmill.workflows.budget import latency
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (10, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _machine(tmp_path, monkeypatch):
    """Times of a machine that multiplies integers of few bits faster than floats."""
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))

    def seconds(format, shape, tokens):
        if format is None:
            return 10e-6
        return 1e-6 * (format.input_format.rate if format.quantizes_inputs else 8 + format.core.rate / 8)

    monkeypatch.setattr(latency, "layer_seconds", seconds)


def pair(weight_bits: int, input_bits: int):
    base = build_recipe("rtn", {"bits": weight_bits, "group_size": 16})
    inputs = parse_inputs(f"uniform:bits={input_bits},group_size=16,simulated=true")
    return replace(base, inputs=inputs)


PAIRS = [build_recipe("rtn", {"bits": 8, "group_size": 16}), *(pair(w, a) for w in (4, 8) for a in (4, 8))]


def to_budget(budget="0.08ms prompts of 32", out=None, **options):
    given = {"methods": PAIRS, "corrections": 0, "calib": WINDOWS, "progress": False}
    return bitmill.quantize(tiny_model("llama"), budget=budget, out=out, **{**given, **options})


def test_inputs_of_some_layers_are_rounded(tmp_path):
    file = tmp_path / "plan.yaml"
    outcome = to_budget(out=tmp_path / "out", save_recipe=file)
    budget = outcome.report["budget"]
    # 14 layers: 56 us with inputs of 4 bits in all, 112 us with 8
    assert 0.07e-3 < budget["linear_time_s"] <= 0.08e-3
    chosen = {label for kind in budget["kinds"] for label in kind["chosen"]}
    assert {label.partition(", ")[2] for label in chosen} >= {"4-bit inputs", "8-bit inputs"}
    least = min(budget["plans"], key=lambda plan: plan["measured_kl"])
    assert budget["written"] == least["name"]
    assert find_recipe(str(file)).to_dict() == outcome.report["recipe"] | {"name": find_recipe(str(file)).name}
    assert "inputs" in file.read_text()


def test_cost_of_inputs_adds_to_that_of_weights():
    costs = {
        label: sum(kind["costs"][label] for kind in kinds)
        for kinds in [to_budget(dry_run=True).summary["budget"]["kinds"]]
        for label in kinds[0]["costs"]
    }
    assert costs["rtn 8-bit"] < costs["rtn 8-bit, 8-bit inputs"] < costs["rtn 8-bit, 4-bit inputs"]
    of_inputs = costs["rtn 8-bit, 4-bit inputs"] - costs["rtn 8-bit"]
    assert costs["rtn 4-bit, 4-bit inputs"] - costs["rtn 4-bit, 8-bit inputs"] == pytest.approx(
        of_inputs - (costs["rtn 8-bit, 8-bit inputs"] - costs["rtn 8-bit"])
    )


def test_inputs_are_measured_once(monkeypatch):
    to_budget(dry_run=True)
    monkeypatch.setattr(sensitivity, "Divergences", None)
    to_budget("0.1ms prompts of 32", dry_run=True)


def test_rules_take_no_inputs(tmp_path):
    outcome = to_budget("0.09ms prompts of 32", tmp_path / "out", rules=["*.o_proj=uniform:bits=8"])
    layers = {layer["name"]: str(layer["format"]) for layer in outcome.report["layers"]}
    rounded = {name for name, format in layers.items() if "quantized_inputs" in format}
    assert rounded
    assert not any(name.endswith("o_proj") for name in rounded)


def test_corrections_are_left_out():
    assert "do not round inputs" in " ".join(to_budget(dry_run=True, corrections=1).summary["budget"]["notes"])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [("w8a8", {"static": True}, "comes from calibration"), ("quik", {}, "cannot be a candidate")],
)
def test_refused(method, options, message):
    with pytest.raises(UsageError, match=message):
        to_budget(methods=[build_recipe(method, options)], dry_run=True)
