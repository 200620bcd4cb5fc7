"""Tasks are measured through lm-eval, recorded, and shown with standard errors."""

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
from bitmill.errors import UsageError
from bitmill.integrations.lm_eval import log_likelihoods
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
    monkeypatch.setattr("bitmill.workflows.tasks.load_items", lambda task, limit: ITEMS[task.name][:limit])


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
