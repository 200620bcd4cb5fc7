"""bitmill compare: failing cells, changed terms, damaged records."""

from __future__ import annotations

import io
import json

import pytest

from bitmill.cli.main import main
from bitmill.data.benchmark_tasks import Item
from bitmill.data.generated_tasks import ProgramQuestion
from bitmill.errors import NumericsError
from bitmill.evaluation.prompt import Prompt
from bitmill.report.formatting import GAP
from bitmill.workflows import prepared_tasks
from bitmill.workflows.budget import candidates
from bitmill.workflows.comparison import run, worker
from bitmill.workflows.comparison.process import VariantFailed
from helpers.comparisons import command, names, results


def test_a_grid(workspace, quick, capsys):
    assert main(command(workspace, "--set", "gptq.damp=0.05", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    found = results(workspace)
    assert [v.name for v in found.variants] == ["rtn-3bit", "rtn-4bit", "gptq-3bit", "gptq-4bit"]
    assert [v["name"] for v in printed["variants"]] == [v.name for v in found.variants]
    assert "layers" not in printed["variants"][0]
    for variant in found.variants:
        assert variant.status == "done"
        assert variant.tokens == found.float.tokens == 64
        assert variant.kl_divergence > 0
        assert 0 <= variant.top1_agreement <= 1
        assert variant.quantize_time_s > 0
        assert variant.peak_memory_bytes > 1e6
        assert variant.size_bytes < 5 * found.float.size_bytes
        assert len(variant.layers) == 14
        assert len(variant.samples) == len(found.float.samples) == 3
    assert found.variants[2].recipe["solver"]["damp"] == 0.05
    assert found.variants[2].layers[0].output_error > 0
    assert found.settings.chat is True
    assert "--set gptq.damp=0.05" in found.commands[0]
    kept = {"grid.json", "results.json", "report.html", "lock", "cells/float.json"}
    assert names(workspace.root / "grid") == kept | {f"cells/{v.name}.json" for v in found.variants}
    page = (workspace.root / "grid" / "report.html").read_text()
    assert all(f"{v.method} {v.bits}-bit" in page for v in found.variants)


@pytest.fixture
def questions(monkeypatch):
    """Two choices that are scored alike, and a program that passes whatever is written into its text."""
    program = ProgramQuestion(Prompt("w1 w2"), 'text = """', '"""')
    items = {
        "arc_easy": [Item((("w1", " w2"), ("w1", " w3")), label) for label in (0, 1)],
        "humaneval": [program] * 2,
    }
    monkeypatch.setattr(prepared_tasks, "load_items", lambda task, limit: items[task.name][:limit])
    monkeypatch.setattr(prepared_tasks, "require_lm_eval", lambda: None)
    monkeypatch.setattr(prepared_tasks, "log_likelihoods", lambda m, t, pairs, *_: [(-1.0, True)] * len(pairs))


def test_tasks(workspace, quick, questions, capsys):
    named = ["--tasks", "arc_easy,humaneval", "--limit", "2"]
    assert main(command(workspace, *named)) == 2
    assert "allow that with --run-code" in capsys.readouterr().err
    named.append("--run-code")
    assert main(command(workspace, *named, "--keep-models", methods="rtn", bits="4")) == 0
    shown, found = capsys.readouterr().out, results(workspace)
    assert "humaneval pass_at_1" in " ".join(shown.split())
    assert (found.settings.tasks.names, found.settings.tasks.limit) == (["arc_easy", "humaneval"], 2)
    assert "--tasks arc_easy,humaneval --limit 2" in found.commands[0]
    (variant,) = found.variants
    for model in (found.float, variant):
        assert model.tasks["arc_easy"]["acc"] == 0.5
        assert model.tasks["humaneval"]["pass_at_1"] == 1.0
    page = (workspace.root / "grid" / "report.html").read_text()
    assert "1.000 ± 0.000 (0.158 to 1.000)" in page
    assert f"The first 2{GAP}documents of each task" in page
    kept = json.loads((workspace.root / "grid" / "cells" / "rtn-4bit" / "report.json").read_text())
    assert kept["tasks"] == variant.tasks
    assert main(command(workspace, methods="rtn", bits="4")) == 1
    assert "settings.tasks was" in capsys.readouterr().err


def test_equals_eval(workspace, quick, capsys):
    assert main(command(workspace, "--keep-models", methods="gptq", bits="3")) == 0
    (variant,) = results(workspace).variants
    folder = workspace.root / "grid" / "cells" / "gptq-3bit"
    capsys.readouterr()
    evaluate = ["eval", str(folder), "--text", workspace.text.name, "--seqlen", "32", "--windows", "2"]
    assert main([*evaluate, "--reference", "source", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert variant.perplexity == pytest.approx(measured["perplexity"], rel=1e-5)
    assert variant.kl_divergence == pytest.approx(measured["kl_divergence"], rel=1e-2)
    assert variant.top1_agreement == measured["top1_agreement"]
    assert results(workspace).float.perplexity == pytest.approx(measured["reference_perplexity"], rel=1e-5)
    recorded = json.loads((folder / "report.json").read_text())["measured"]
    assert recorded[0]["perplexity"] == variant.perplexity
    assert main(["verify", str(folder)]) == 0


def test_second_run_does_nothing(workspace, quick, monkeypatch):
    assert main(command(workspace, bits="3")) == 0
    before = names(workspace.root / "grid"), results(workspace)
    monkeypatch.setattr(worker, "main", pytest.fail)
    assert main(command(workspace, bits="3")) == 0
    assert (names(workspace.root / "grid"), results(workspace)) == before


def test_grid_grows(workspace, quick):
    state = workspace.root / "grid" / "cells" / "rtn-3bit.state"
    state.parent.mkdir(parents=True)
    state.write_text('{"quantize_time_s": 1e6}')  # of work that is gone
    assert main(command(workspace, methods="rtn", bits="3")) == 0
    before = results(workspace).variants[0]
    assert before.quantize_time_s < 1e5
    assert main(command(workspace, methods="gptq", bits="4")) == 0
    found = results(workspace)
    assert [v.name for v in found.variants] == ["gptq-4bit", "rtn-3bit"]
    assert found.variants[1] == before
    assert len(found.commands) == 2


def test_other_recipe_starts_anew(workspace, quick):
    cells = workspace.root / "grid" / "cells"
    (cells / "gptq-3bit.partial").mkdir(parents=True)
    (cells / "gptq-3bit.partial" / "lock").touch()
    (cells / "gptq-3bit.partial" / "journal.json").write_text("{}")
    (cells / "gptq-3bit.state").write_text('{"quantize_time_s": 1e6, "recipe": {"name": "another"}}')
    assert main(command(workspace, methods="gptq", bits="3")) == 0
    (variant,) = results(workspace).variants
    assert variant.quantize_time_s < 1e5


def test_held_out_windows(workspace, quick, capsys):
    assert main(command(workspace, methods="rtn", bits="3")) == 0
    grid = json.loads((workspace.root / "grid" / "grid.json").read_text())
    grid["terms"]["settings"]["evaluation"]["sha256"] = "0" * 64
    (workspace.root / "grid" / "grid.json").write_text(json.dumps(grid))
    fragment = io.StringIO()
    assert worker.main([str(workspace.root / "grid"), "rtn-3bit"], stdout=fragment) == 1
    assert "has changed since" in json.loads(fragment.getvalue().splitlines()[-1])["failed"]


def test_damaged_commands_refused(workspace, quick, capsys):
    assert main(command(workspace, methods="rtn", bits="3")) == 0
    file = workspace.root / "grid" / "grid.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "commands": [1]}))
    capsys.readouterr()
    assert main(command(workspace, methods="rtn", bits="3")) == 1
    assert "grid.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        (["--windows", "3"], "settings.evaluation.windows was 2 and is now 3"),
        (["--seed", "1"], "settings.calibration.seed was 0 and is now 1"),
        (
            ["--set", "rtn.group_size=8"],
            "holds 'rtn-3bit' with another recipe (weight.group_size was 64 and is now 8)",
        ),
        (["--propagate", "float"], "settings.propagate was 'quantized' and is now 'float'"),
    ],
)
def test_changed_terms_refused(workspace, quick, capsys, more, fragment):
    assert main(command(workspace, methods="rtn", bits="3")) == 0
    capsys.readouterr()
    assert main(command(workspace, *more, methods="rtn", bits="3")) == 1
    error = capsys.readouterr().err
    assert fragment in error
    assert error.count("\n") == 1


def test_failed_cells_are_rows(workspace, quick, broken, capsys, monkeypatch):
    quantize = worker.quantize

    def sometimes(model, recipe, **options):
        if recipe.name == "gptq" and recipe.weight.bits == 3:
            raise NumericsError("A matrix is not finite; use another.")
        if recipe.name == "gptq":
            raise ZeroDivisionError("of our\nmaking")
        return quantize(model, recipe, **options)

    monkeypatch.setattr(worker, "quantize", sometimes)
    assert main(command(workspace, "--recipes", broken, methods="gptq,nf4", bits="3,4,8")) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("error: 4 of 7 variants failed, the first one 'gptq-3bit'")
    rows = {v.name: (v.status, v.reason) for v in results(workspace).variants}
    assert rows["nf4-3bit"] == rows["nf4-4bit"] == ("done", None)
    assert rows["nf4-8bit"][0] == "not_applicable"
    assert rows["gptq-3bit"] == ("failed", "A matrix is not finite; use another.")
    assert rows["gptq-4bit"] == ("failed", "Unexpected ZeroDivisionError: of our making.")
    assert rows["broken"][0] == "failed"
    assert "ignores every linear layer" in rows["broken"][1]
    for name in ("gptq-3bit: failed: A matrix", "nf4-8bit: not applicable: "):
        assert name in out
    monkeypatch.setattr(worker, "quantize", quantize)
    assert main(command(workspace, methods="gptq,nf4", bits="3,4,8")) == 0  # what failed is tried again
    assert {v.status for v in results(workspace).variants if v.name != "broken"} == {"done", "not_applicable"}


def test_shared_statistics(workspace, quick):
    assert main(command(workspace, "--propagate", "float", methods="gptq")) == 0
    assert {v.status for v in results(workspace).variants} == {"done"}
    assert not (workspace.root / "grid" / "statistics").exists()


def test_budgets(workspace, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(candidates, "BITS", (2, 4))
    monkeypatch.setattr(candidates, "HEAD_BITS", (8,))
    assert main([*command(workspace, methods="rtn", bits="2"), "--budgets", "4bpw"]) == 0
    one, budget = results(workspace).variants
    assert (one.name, budget.name) == ("rtn-2bit", "budget-4bpw")
    assert one.bits_per_weight < budget.bits_per_weight <= 4


def test_prompts_from_a_file(workspace, quick, capsys):
    (workspace.root / "prompts.txt").write_text("w1 w2\n\n  w3 \n")
    assert main(command(workspace, "--prompts", "prompts.txt", methods="rtn", bits="4")) == 0
    assert results(workspace).settings.prompts == ["w1 w2", "w3"]
    (workspace.root / "prompts.txt").write_text("\n")
    assert main(command(workspace, "--prompts", "prompts.txt", methods="rtn", bits="4")) == 2
    assert main(command(workspace, "--prompts", "nowhere.txt", methods="rtn", bits="4")) == 2
    assert "nowhere.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "status", "fragment"),
    [
        (["--bits", "three"], 2, "'three'"),
        (["--bits", "3,9"], 2, "not 9"),
        (["--set", "rtn.bitz=1"], 2, "no option 'bitz'"),
        (["--methods", "nonsense"], 2, "no method 'nonsense'"),
        (["--methods", ""], 2, "nothing to compare"),
        (["--set", "damp=1"], 2, "METHOD.KEY=VALUE"),
        (["--set", "rtn.bits=1"], 2, "--bits"),
        (["--set", "rtn.x=1", "--set", "rtn.x=2"], 2, "twice"),
        (["--propagate", "sideways"], 2, "'sideways'"),
        (["--calib", "nowhere.txt"], 1, "nowhere.txt"),
        (["--seqlen", "65"], 1, "at most 64 tokens"),
        (["-o", "text.txt"], 1, "text.txt"),
    ],
)
def test_grid_error_message(workspace, quick, capsys, more, status, fragment):
    assert main(command(workspace, *more, methods="rtn", bits="3")) == status
    out, err = capsys.readouterr()
    assert fragment in err
    assert err.count("\n") == 1
    assert out == ""


def test_float_model_must_be_measured(workspace, quick, capsys, monkeypatch):
    def fail(*_):
        raise VariantFailed("Its process was killed.")

    monkeypatch.setattr(run.run_grid, "__kwdefaults__", {**run.run_grid.__kwdefaults__, "run": fail})
    assert main(command(workspace)) == 1
    assert "The float model cannot be measured: Its process was killed." in capsys.readouterr().err


def test_lock(workspace, quick, capsys):
    import fcntl

    (workspace.root / "grid" / "cells").mkdir(parents=True)
    with (workspace.root / "grid" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command(workspace)) == 1
    assert "Another process" in capsys.readouterr().err


def test_foreign_folder_refused(workspace, quick, capsys):
    (workspace.root / "grid").mkdir()
    (workspace.root / "grid" / "thesis.txt").touch()
    assert main(command(workspace)) == 1
    assert "holds 'thesis.txt' and no comparison" in capsys.readouterr().err


def test_damaged_record_message(workspace, quick, capsys):
    assert main(command(workspace, methods="rtn", bits="3")) == 0
    (workspace.root / "grid" / "cells" / "rtn-3bit.json").write_text("{")
    assert main(command(workspace, methods="rtn", bits="3")) == 1
    assert "rtn-3bit.json cannot be read; delete it" in capsys.readouterr().err
