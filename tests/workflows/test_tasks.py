"""Tasks are measured, recorded, and shown with standard errors."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch

import bitmill
from bitmill.checkpoint.record import record_tasks
from bitmill.cli.main import main
from bitmill.data.benchmark_tasks import Item
from bitmill.data.generated_tasks import NumberQuestion, ProgramQuestion
from bitmill.errors import UsageError
from bitmill.evaluation.generated_answers import answer, final_number
from bitmill.evaluation.prompt import Prompt
from bitmill.integrations.lm_eval import log_likelihoods
from bitmill.workflows import prepared_tasks
from helpers.workspace import save_model

PAIRS = [("w1 w2", " w3"), ("w1 w2", " w4 w5"), ("w7", " w3"), ("w8 w9 w1", " w2 w3 w4")]
ITEMS = {
    "arc_easy": [Item((PAIRS[0], PAIRS[1]), 1), Item((PAIRS[0], PAIRS[1]), 0), Item((PAIRS[2], PAIRS[3]), 0)],
    "lambada": [Item((pair,), 0) for pair in PAIRS],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    source = save_model(root / "source")
    options = {"bits": 4, "group_size": 16, "head_bits": 8, "measure": 0, "progress": False}
    bitmill.quantize(str(source), "rtn", out=str(root / "done"), **options)
    return source, root / "done"


@pytest.fixture
def lm_eval(monkeypatch):
    pytest.importorskip("lm_eval.models.huggingface", reason='needs pip install "bitmill[tasks]"')
    monkeypatch.setattr(
        "bitmill.workflows.prepared_tasks.load_items", lambda task, limit: ITEMS[task.name][:limit]
    )


def test_log_likelihoods(folders, lm_eval):
    for folder in folders:
        model, tokenizer = bitmill.load(folder), bitmill.load_tokenizer(folder)
        counter = itertools.count()
        scored = log_likelihoods(model, tokenizer, PAIRS, 2, counter.__next__)
        assert next(counter) == len(PAIRS)
        assert tokenizer.pad_token is None
        for (context, text), (logp, greedy) in zip(PAIRS, scored, strict=True):
            start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + text)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits.log_softmax(-1)[0, start - 1 : -1]
            expected = logits.gather(1, torch.tensor(ids[start:])[:, None]).sum()
            assert logp == pytest.approx(float(expected), abs=1e-4)
            assert greedy == (logits.argmax(-1).tolist() == ids[start:])


def test_measured_and_recorded(folders, lm_eval, capsys):
    source, done = folders
    command = ["eval", str(done), "--tasks", "arc_easy,lambada", "--limit", "3", "--reference", str(source)]
    assert main([*command, "--record", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    figures = result["tasks"]["arc_easy"]
    assert result["recorded"]
    assert figures["documents"] == 3
    assert {"acc", "acc_stderr", "acc_norm", "reference_acc", "reference_acc_norm_stderr"} < set(figures)
    assert {"acc", "perplexity", "perplexity_stderr"} < set(result["tasks"]["lambada"])
    recorded = json.loads((done / "report.json").read_text())["tasks"]
    assert recorded["arc_easy"] == {**figures, "reference": str(source)}


@pytest.fixture(scope="module")
def asked(folders):
    """Two questions of each kind, of which the quantized model answers the first right."""
    prompt = Prompt("w1 w2", reply="w3")
    model, tokenizer = bitmill.load(folders[1]), bitmill.load_tokenizer(folders[1])
    number = final_number(answer(model, tokenizer, prompt, (), 512))
    return {
        "gsm8k": [NumberQuestion(prompt, number), NumberQuestion(prompt, number + 1)],
        "humaneval": [
            ProgramQuestion(prompt, 'text = """', f'"""\nassert {test}') for test in ("text", "not text")
        ],
    }


@pytest.fixture
def questions(asked, monkeypatch):
    monkeypatch.setattr(prepared_tasks, "load_items", lambda task, limit: asked[task.name][:limit])


def test_generated_answers(folders, questions, capsys):
    done = folders[1]
    command = ["eval", str(done), "--tasks", "gsm8k,humaneval", "--run-code", "--record"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for task, metric in (("gsm8k", "exact_match"), ("humaneval", "pass_at_1")):
        figures = result["tasks"][task]
        assert figures == {
            "documents": 2,
            metric: 0.5,
            f"{metric}_stderr": 0.5,
            f"{metric}_interval": pytest.approx([0.0126, 0.9874], abs=1e-4),
        }
        assert json.loads((done / "report.json").read_text())["tasks"][task] == figures
    for document in ("README.md", "report.html"):
        assert "0.500 ± 0.500 (0.013 to 0.987)" in (done / document).read_text()


def test_programs_need_permission(folders, questions, capsys):
    assert main(["eval", str(folders[1]), "--tasks", "gsm8k,humaneval,mbpp"]) == 2
    assert "humaneval and mbpp would run programs that the model writes; allow that with --run-code" in " ".join(
        capsys.readouterr().err.split()
    )


def test_gaps_of_the_sandbox_are_shown(folders, questions, monkeypatch, capsys):
    monkeypatch.setattr(prepared_tasks.Sandbox, "_run", lambda sandbox, program: ["files"])
    assert main(["eval", str(folders[1]), "--tasks", "humaneval", "--run-code"]) == 0
    assert "programs could reach" in (shown := capsys.readouterr().out)
    assert "processes and network" in shown


def test_card_and_page(folders):
    done = folders[1]
    figures = {"documents": 200, "acc": 0.5, "acc_stderr": 0.0354, "perplexity": 12.345, "perplexity_stderr": None}
    for acc in (0.25, 0.5):  # the second replaces the first
        record_tasks(done, {"tasks": {"lambada": {**figures, "acc": acc}}, "reference": None})
    card = (done / "README.md").read_text()
    (row,) = (line for line in card.splitlines() if line.startswith("| lambada"))
    assert "0.500 ± 0.035" in row
    assert "12.35" in row
    assert "0.500 ± 0.035" in (done / "report.html").read_text()


def test_lm_eval_is_missing(folders, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(folders[1]), "--tasks", "piqa"]) == 2
    assert 'pip install "bitmill[tasks]"' in capsys.readouterr().err


def test_other_modules_are_refused(folders):
    with pytest.raises(UsageError, match="Tasks need a model of transformers, and this is a Linear"):
        log_likelihoods(torch.nn.Linear(2, 2), bitmill.load_tokenizer(folders[0]), PAIRS, 1, lambda: None)


def test_refused(folders):
    with pytest.raises(UsageError, match="limit is 0"):
        bitmill.evaluate_tasks(folders[0], ["piqa"], limit=0)
