"""Rescoring: scores are those of the model, the weight is tuned, and errors leave nothing behind."""

from __future__ import annotations

import json

import pytest
import torch

from bitmill.errors import BitmillError, OutputError, UsageError
from bitmill.evaluation.text_scores import log_probabilities
from bitmill.models.block_call import output_fn
from bitmill.workflows.rescore import rescore
from helpers.tiny_models import tiny_model


class Words:
    """A tokenizer: w3 is token 3."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, **options):
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def nbest_file(path, count=6):
    """The text `w3 w4` is always right, and the recognizer prefers another one."""
    lines = [
        {
            "id": f"u{n}",
            "hypotheses": [{"text": "w9 w9 w9", "score": -1.0}, {"text": "w3 w4", "score": -2.0}],
            "reference": "w3 w4",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def lm():
    """A model that gives `w3 w4` a higher probability than `w9 w9 w9`."""
    model = tiny_model("lstm_lm", head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[[3, 4]] += 5
    return model


@pytest.mark.parametrize("model_type", ["lstm_lm", "llama"])
@torch.no_grad()
def test_scores_do_not_depend_on_the_batch(model_type):
    model = tiny_model(model_type)
    texts = ["w5", "w3 w4 w5 w6 w7", "", "w3 w4 w5"]
    found = log_probabilities(output_fn(model), model.config, Words(), texts, batch_size=3, score_end=True)
    for text, score in zip(texts, found):
        row = torch.tensor([[1, *Words()(text)["input_ids"], 2]])
        logp = model(row[:, :-1]).logits.log_softmax(-1)
        assert score == pytest.approx(float(logp.gather(-1, row[:, 1:, None]).sum()), abs=1e-4)
    assert log_probabilities(output_fn(model), model.config, Words(), ["w5", ""])[1] == 0


def test_tuned_and_measured(lm, tmp_path):
    pytest.importorskip("jiwer")
    nbest, out = nbest_file(tmp_path / "nbest.jsonl"), tmp_path / "out.jsonl"
    result = rescore(nbest, lm, out=out, tokenizer=Words(), dev_share=0.34)
    assert (result["tuned_on"], result["utterances"], result["hypotheses"]) == (2, 6, 12)
    errors = result["word_errors"]
    assert (errors["first"], errors["rescored"], errors["oracle"], errors["words"]) == (1.5, 0.0, 0.0, 8)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["w3 w4"] * 6
    first, second = lines[0]["hypotheses"]
    assert second["combined"] == pytest.approx(-2.0 + result["lm_weight"] * second["lm_score"])
    assert second["combined"] > first["combined"]


def test_weight_and_penalty_as_given(lm, tmp_path):
    pytest.importorskip("jiwer")
    nbest = nbest_file(tmp_path / "nbest.jsonl")
    result = rescore(nbest, lm, out=tmp_path / "out", tokenizer=Words(), lm_weight=0.0)
    assert (result["tuned_on"], result["word_errors"]["rescored"]) == (0, 1.5)
    options = {"lm_weight": 0.0, "insertion_penalty": -2.0, "overwrite": True}
    shorter = rescore(nbest, lm, out=tmp_path / "out", tokenizer=Words(), **options)
    assert shorter["word_errors"]["rescored"] == 0.0


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({}, UsageError, "to tune|tuned on"),
        ({"lm_weight": 1.0, "costs": "absent"}, UsageError, "There is no file of costs"),
        ({"lm_weight": float("nan")}, UsageError, "lm_weight is nan"),
        ({"dev_share": 1.0}, UsageError, "dev_share"),
        ({"batch_size": 0}, UsageError, "batch_size"),
        ({"out": "nowhere/out"}, OutputError, "There is no folder"),
        ({"out": "nbest.jsonl"}, OutputError, "exists"),
        ({"lm": tiny_model("bert"), "lm_weight": 1.0}, UsageError, "predicts no tokens"),
    ],
)
def test_refused(options, kind, reason, lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {"id": "u", "hypotheses": [{"text": "w3", "score": -1.0}]}
    (tmp_path / "nbest.jsonl").write_text(json.dumps(line))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=reason):
        rescore("nbest.jsonl", **{"lm": lm, "out": "out", "tokenizer": Words(), **options})
    assert sorted(tmp_path.iterdir()) == before


def test_words_outside_the_vocabulary(lm, tmp_path):
    line = {"id": "u", "hypotheses": [{"text": "w999", "score": -1.0}]}
    (tmp_path / "nbest").write_text(json.dumps(line))
    with pytest.raises(BitmillError, match="the token 999"):
        rescore(tmp_path / "nbest", lm, out=tmp_path / "out", tokenizer=Words(), lm_weight=1.0)
    assert not (tmp_path / "out").exists()


def test_lattices(lm, tmp_path):
    arcs = "0 1 w9 0.5\n1 2 w9 0.2\n2 3 w9 0.3\n0 4 w3 1.5\n4 3 w4 0.5\n3\n"
    (tmp_path / "lattices").mkdir()
    for n in range(2):
        (tmp_path / "lattices" / f"u{n}.txt").write_text(arcs)
    options = {"tokenizer": Words(), "lm_weight": 1.0}
    rescore(tmp_path / "lattices", lm, out=tmp_path / "a.jsonl", paths=5, **options)
    lists = nbest_file(tmp_path / "nbest.jsonl", 2)
    lists.write_text(lists.read_text().replace(', "reference": "w3 w4"', ""))
    rescore(lists, lm, out=tmp_path / "b.jsonl", **options)
    found, expected = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("a.jsonl", "b.jsonl")
    )
    for one, other in zip(found, expected):
        assert one == other
    with pytest.raises(UsageError, match="paths is 0"):
        rescore(tmp_path / "lattices", lm, out=tmp_path / "c.jsonl", paths=0, **options)
    with pytest.raises(UsageError, match="--costs belongs"):
        rescore(tmp_path / "lattices", lm, out=tmp_path / "c.jsonl", paths=5, costs=lists, **options)
