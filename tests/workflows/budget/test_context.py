"""A budget of memory at a context: weights, keys and values are chosen together, and the process is measured."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.errors import BitmillError
from bitmill.kv.calibration_file import load_calibration
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.method import build_recipe
from bitmill.sensitivities import keys_values
from bitmill.sensitivities.base import Run
from bitmill.sources.module import ModuleSource
from bitmill.workflows.budget import run as budget_run
from bitmill.workflows.budget.size import parse_budget
from bitmill.workflows.plan.plan import plan
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (10, 32), generator=torch.Generator().manual_seed(7))
PROGRAM = 1_000_000  # bytes, in place of a process that takes seconds to measure


@pytest.fixture(autouse=True)
def _fast(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(budget_run, "measured_peak", lambda *given: PROGRAM)


def to_budget(budget: str, out=None, **options):
    methods = [build_recipe("rtn", {"bits": bits, "group_size": 16}) for bits in (2, 4, 8)]
    given = {"methods": methods, "corrections": 0, "calib": WINDOWS, "progress": False, "kv": "per_token"}
    model = tiny_model("llama", max_position_embeddings=65536)
    return bitmill.quantize(model, budget=budget, out=out, **{**given, **options})


def memory_at(limit: float, context: str = "4k") -> dict:
    return to_budget(f"{limit}MB at {context} context", dry_run=True).summary["budget"]


def test_bits_of_keys_and_values_follow_the_budget():
    least = memory_at(15.4)
    more = memory_at(16.1)
    for budget, limit in ((least, 15.4e6), (more, 16.1e6)):
        assert budget["plans"][0]["memory_bytes"] <= limit
        assert budget["context"] == 4096
        assert budget["kv"].startswith("kvtuner:base=per_token,pairs=")
    assert least["memory"]["keys_values"] <= more["memory"]["keys_values"]
    assert sum(more["memory"].values()) <= 16.1e6
    (kind,) = (kind for kind in more["kinds"] if kind["name"] == "keys and values")
    costs = list(kind["costs"].values())
    assert kind["units"] == 2
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > 0


def test_folder_and_recipe_have_the_bits(tmp_path, monkeypatch):
    file = tmp_path / "plan.yaml"
    outcome = to_budget("16.1MB at 4k context", tmp_path / "out", save_recipe=file, measure=0)
    budget = outcome.report["budget"]
    recipe = find_recipe(str(file))
    assert recipe.kv == budget["kv"]
    stored = load_calibration(bitmill.load(tmp_path / "out"))
    assert stored.method.name == "kvtuner"
    assert f"kvtuner:base=per_token,pairs={stored.method.pairs}" == recipe.kv
    assert budget["measured_peak_bytes"] > 100e6  # of the whole process, which this budget does not hold
    assert "is above the budget" in budget["notes"][-1]
    again = bitmill.quantize(
        tiny_model("llama"), str(file), calib=WINDOWS, progress=False, out=tmp_path / "again", measure=0
    )
    assert again.summary["kv"]["method"] == outcome.summary["kv"]["method"]


def test_attention_error_ranks_pairs(tmp_path):
    streamed = StreamedModel(ModuleSource(tiny_model("llama")))
    found = keys_values.measure_keys_values(
        Run(streamed, WINDOWS, tmp_path, Progress()), "per_token", keys_values.PAIRS
    )
    assert found.keys() == {0, 1}
    for own in found.values():
        costs = [own[pair] for pair in keys_values.PAIRS]
        assert costs == sorted(costs, reverse=True)
    assert streamed.model.config._attn_implementation == "sdpa"
    (unused,) = (keys_values.pairs_of("rotated"),)
    assert unused == ((2, 2), (4, 2), (4, 4))  # it has no 8 bits


def test_context_beyond_the_trained_one_is_a_warning():
    budget = to_budget("440MB at 128k context", dry_run=True, methods=["rtn"], kv="per_token")
    assert "is beyond the 65,536 that the model was trained for" in budget.summary["budget"]["notes"][0]


REFUSED = {
    "below": (
        {"budget": "2MB at 4k context"},
        r"below the [\d,]+ bytes of memory at 4,096 tokens that the smallest",
    ),
    "above": ({"budget": "900GB at 4k context"}, "nothing needs to be quantized"),
    "bits of keys": ({"budget": "16MB at 4k context", "kv_bits": 4}, "chooses bits of keys and values"),
    "calibrated": ({"budget": "16MB at 4k context", "kv": "kvquant"}, "without calibration"),
    "no context": ({"budget": "4bpw"}, "give it a context"),
    "bits at a context": ({"budget": "3bpw at 4k context"}, "bits per weight have no context"),
    "heads": ({"budget": "16MB at 4k context", "kv": "kivi"}, "32 channels share a scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case, monkeypatch):
    monkeypatch.setattr(budget_run, "token_windows", None)
    options, message = REFUSED[case]
    with pytest.raises(BitmillError, match=message):
        to_budget(**options, dry_run=True)


def test_forms():
    assert parse_budget("8GB at 32k context").context == 32768
    assert parse_budget("1.5GiB at 1M tokens").context == 1 << 20
    assert parse_budget(parse_budget(" 8 GB at 32k  context").text) == parse_budget("8GB at 32k context")


def test_plan_command_takes_pairs():
    sizes = [
        plan("llama-7b", context=4096, kv=f"kvtuner:base=kivi,pairs={pairs}")["needed_bytes"]
        for pairs in ("32*8/4", "16*8/4 16*4/2", "32*2/2")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
