"""A budget instead of a bit-width: kept, verified, rolled back, written as a recipe that can be passed back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import bitmill
from bitmill.cli.main import main
from bitmill.errors import BitmillError, UsageError
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.sensitivities import candidate, measure, noise
from bitmill.workflows.budget import run, verify
from bitmill.workflows.probe import short_trial as trial
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, write_text

WINDOWS = torch.randint(3, 128, (10, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))


def rtn(bits: int, method: str = "rtn") -> Recipe:
    return build_recipe(method, {"bits": bits, "group_size": 16})


def to_budget(budget: str, out=None, model: str = "llama", **options):
    given = {"methods": [rtn(bits) for bits in (2, 4, 8)], "corrections": 0, "calib": WINDOWS, "progress": False}
    return bitmill.quantize(tiny_model(model), budget=budget, out=out, **{**given, **options})


def test_bits_per_weight(tmp_path):
    methods = [rtn(bits, "gptq") for bits in (2, 4, 8)]
    outcome = to_budget("4.0bpw", tmp_path / "out", methods=methods)
    budget = outcome.report["budget"]
    assert 3.5 < budget["bits_per_weight"] <= 4.0
    assert outcome.summary["bits_per_weight"] == pytest.approx(budget["bits_per_weight"])
    assert len(outcome.summary["formats"]) > 1
    assert outcome.report["identity"]["calibration"]["held_apart"] == 1
    plans = budget["plans"]
    least = min(plans, key=lambda plan: plan["measured_kl"])
    assert budget["written"] == least["name"]
    assert {plan["name"].split()[0] for plan in plans} == {"plan", "uniform"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "chosen for a budget of 4.0bpw" in card
    assert f"{least['measured_kl']:.4f} measured" in card
    assert "█" in str(outcome)
    assert "█" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("model", ["llama", "gpt2"])  # with a head of its own, and a tied one
def test_file_size(tmp_path, model):
    whole = sum(p.numel() * 4 for p in tiny_model(model).parameters())
    limit = whole * 2 // 5
    outcome = to_budget(f"{limit / 1000}kB", tmp_path / "out", model, methods=[rtn(2), rtn(8)])
    files = [*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / "model.safetensors.index.json"]
    size = sum(file.stat().st_size for file in files if file.name != "reference.safetensors")
    assert size == outcome.report["budget"]["size_bytes"]
    assert 0.8 * limit < size <= limit


def test_recipe_is_passed_back(tmp_path):
    file = tmp_path / "plan.yaml"
    planned = to_budget("4.0bpw", save_recipe=file, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert planned.summary["budget"]["plans"][0]["measured_kl"] is None
    recipe = find_recipe(str(file))
    outcome = bitmill.quantize(tiny_model("llama"), str(file), calib=WINDOWS, progress=False)
    assert outcome.summary["bits_per_weight"] == pytest.approx(planned.summary["budget"]["bits_per_weight"])
    assert recipe.to_dict() == outcome.report["recipe"] | {"name": recipe.name}
    rules = [line for line in file.read_text().splitlines() if line.startswith("- {sites")]
    assert len(rules) == len(recipe.rules)
    assert any("[qkv]_proj" in line for line in file.read_text().splitlines()) or len(rules) < 8


def test_sabotaged_sensitivity_is_rolled_back(tmp_path, monkeypatch):
    finish = noise._Meter.finish
    monkeypatch.setattr(noise._Meter, "finish", lambda *given: [1 / (cost + 1e-9) for cost in finish(*given)])
    outcome = to_budget("5.5bpw", tmp_path / "out")
    budget = outcome.report["budget"]
    measured = {plan["name"]: plan["measured_kl"] for plan in budget["plans"]}
    assert measured["plan"] > measured["uniform rtn 4-bit"]
    assert budget["written"] == "uniform rtn 4-bit"
    assert outcome.summary["bits_per_weight"] == pytest.approx(5.25, abs=0.1)
    assert "Written is the uniform rtn 4-bit" in (tmp_path / "out" / "README.md").read_text()


def test_rules_decide_their_layers():
    outcome = to_budget("8bpw", dry_run=True, rules=["*.o_proj=uniform:bits=8", "*.0.mlp.down_proj=float"])
    chosen = {kind["name"]: kind["chosen"] for kind in outcome.summary["budget"]["kinds"]}
    assert chosen["self_attn.o_proj"] == {"rule *.o_proj": 2}
    assert chosen["mlp.down_proj"]["float"] == 1


def test_correction_keeps_the_budget(tmp_path):
    outcome = to_budget("4.0bpw", tmp_path / "out", corrections=1, sensitivity="kl")
    assert all(plan["bits_per_weight"] <= 4.0 for plan in outcome.report["budget"]["plans"])


def test_second_budget_measures_nothing_again(tmp_path, monkeypatch):
    to_budget("4.0bpw", tmp_path / "one")
    monkeypatch.setattr(measure, "solve_unit", None)
    to_budget("3.5bpw", dry_run=True)
    monkeypatch.setattr(verify, "run", None)
    to_budget("4.0bpw", tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


def test_time_limit_is_said(monkeypatch):
    monkeypatch.setattr(run, "_TRIAL_BLOCKS", 1)
    monkeypatch.setattr(run, "short_trial", lambda *given: trial(*given) * 0)
    monkeypatch.setattr(run, "_LEAST_SECONDS", 0.0)
    outcome = to_budget("4bpw", dry_run=True)
    assert "candidates were not measured" in outcome.summary["budget"]["notes"][0]
    assert "not measured" in str(outcome)


REFUSED = {
    "below the cheapest": ({"budget": "1bpw"}, "is below the 3.125 bits per weight that the smallest candidates"),
    "above float": ({"budget": "33bpw"}, "nothing needs to be quantized"),
    "file above float": ({"budget": "1GB"}, "nothing needs to be quantized"),
    "unparsable": ({"budget": "three"}, "write bits per weight"),
    "contradicting rule": ({"budget": "4bpw", "rules": ["*.mlp.*=float"]}, "rules and head bits need at least"),
    "no candidate": ({"budget": "4bpw", "methods": ["awq"]}, "'awq' cannot be a candidate .* scales channels"),
    "tuner": ({"budget": "4bpw", "methods": ["autoround"]}, "'autoround' cannot be a candidate .* tunes"),
    "no methods": ({"budget": "4bpw", "methods": []}, "no method to choose from"),
    "unknown sensitivity": ({"budget": "4bpw", "sensitivity": "luck"}, "no sensitivity 'luck'"),
    "options of a method": ({"budget": "4bpw", "bits": 3}, "leave out bits"),
    "keys and values": ({"budget": "4bpw", "kv": "kivi"}, "counts weights alone"),
    "half of a fused group": ({"budget": "4bpw", "rules": ["*.q_proj=float"]}, "fuse"),
    "no budget": ({"methods": ["gptq"], "method": "rtn"}, "methods belongs to a budget"),
    "corrections": ({"budget": "4bpw", "corrections": 9}, "use 0, 1 or 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case, monkeypatch):
    monkeypatch.setattr(candidate, "solve_stacked", None)
    options, message = REFUSED[case]
    given = {"methods": [rtn(bits) for bits in (2, 4)], "calib": WINDOWS, "progress": False, "dry_run": True}
    with pytest.raises(BitmillError, match=message):
        bitmill.quantize(tiny_model("llama"), **{**given, **options})


def test_encoders_are_refused():
    with pytest.raises(UsageError, match="needs a language model"):
        to_budget("4bpw", dry_run=True, model="bert")


def test_plain_data():
    json.dumps(to_budget("4bpw", dry_run=True).summary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "--methods instead of --method"),
        (["--solver", "gptq"], "leave out --solver"),
        (["--estimate"], "use --dry-run"),
        (["--bits", "3"], "leave out bits"),
    ],
)
def test_command_line_refuses(capsys, options, message):
    assert main(["quantize", "smollm2-135m", "--budget", "3bpw", *options]) != 0
    assert message in capsys.readouterr().err


def test_command_line(tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "source")
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    given = ["--calib", "text.txt", "--samples", "8", "--seqlen", "32", "--methods", "rtn"]
    given += ["--dry-run", "--json"]
    assert main(["quantize", "source", "--budget", "6bpw", *given, "--save-recipe", "p.yaml"]) == 0
    budget = json.loads(capsys.readouterr().out)["budget"]
    assert 5.5 < budget["bits_per_weight"] <= 6
    documented = Path(__file__).parents[3].joinpath("docs", "budget.md").read_text().partition("## In JSON")[2]
    keys = {*budget, *budget["kinds"][0], *budget["plans"][0]}
    assert keys <= set(re.findall(r"`(\w+)`", documented))
    assert find_recipe("p.yaml").name == "budget-6bpw"
