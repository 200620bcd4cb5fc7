"""Training of a folder into a new one: the loss falls, the folder repeats it, refusals."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.training_journal import TrainingJournal
from bitmill.checkpoint.verify import verify
from bitmill.cli.main import main
from bitmill.errors import BitmillError, CheckpointError, NumericsError, OutputError, UsageError
from bitmill.evaluation.metrics import score_windows
from bitmill.files import write_json
from bitmill.models.split import deferred_output_fn
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, snapshot, write_text


@pytest.mark.parametrize(("name", "epochs"), [("uniform", 2), ("gptqt", 2), ("codebook", 1)])
def test_a_trained_folder_repeats_the_lower_loss(folders, teacher, windows, tmp_path, name, epochs):
    out = tmp_path / "out"
    outcome = bitmill.train(
        folders(name), teacher=teacher, calib=windows, out=out, epochs=epochs, rate=1e-2, tokens=64
    )
    before, after = outcome.summary["before"]["kl_divergence"], outcome.summary["after"]["kl_divergence"]
    assert after < 0.9 * before
    assert len(outcome.report["trained"]["curve"]) == 1 + 4 * epochs
    scored = score_windows(
        deferred_output_fn(bitmill.load(out)), windows[-8:], deferred_output_fn(teacher), batch=1
    )
    assert scored["kl_divergence"] == pytest.approx(after, rel=1e-4)
    old, new = open_checkpoint(folders(name)), open_checkpoint(out, digests="all")
    assert verify(new)["layers"] == len(old.formats)
    assert new.bits_per_weight == old.bits_per_weight
    codes = [tensor for tensor in old.entries if tensor.endswith(".codes")]
    assert codes
    assert all(torch.equal(old.tensor(tensor), new.tensor(tensor)) for tensor in codes)
    assert "trained end to end" in (out / "README.md").read_text()
    assert "trained end to end" in (out / "report.html").read_text()


def test_the_next_token_needs_no_teacher(folders, windows, tmp_path):
    outcome = bitmill.train(
        folders("uniform"), calib=windows, loss="next-token", learn="norms", out=tmp_path / "o"
    )
    assert outcome.report["trained"]["teacher"] is None
    assert outcome.summary["after"]["perplexity"] <= outcome.summary["before"]["perplexity"]
    assert "KL divergence" not in str(outcome)


def test_a_folder_trained_twice_tells_both(folders, windows, tmp_path):
    options = {"calib": windows[-12:], "loss": "next-token", "tokens": 64}
    first = bitmill.train(folders("uniform"), out=tmp_path / "a", learn="norms", **options)
    second = bitmill.train(tmp_path / "a", out=tmp_path / "b", learn="scales", **options)
    assert second.report["trained"]["earlier"] == first.report["trained"]
    assert second.report["identity"]["trained"]["earlier"] == first.report["identity"]["trained"]
    assert (tmp_path / "b" / "README.md").read_text().count("trained end to end") == 2
    assert "--reference MODEL" in str(second)
    assert verify(open_checkpoint(tmp_path / "b", digests="all"))["layers"]


def test_nan_ends_training_with_a_sentence(folders, teacher, windows, tmp_path):
    with pytest.raises(NumericsError, match=r"became nan in step \d+ of \d+ at rate 1e\+09; use a lower --rate"):
        bitmill.train(folders("gptqt"), teacher=teacher, calib=windows, out=tmp_path / "out", rate=1e9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loss", ["kl", "next-token"])
def test_text_of_the_float_model(folders, teacher, tmp_path, loss):
    text = bitmill.CalibrationData("self", samples=12, seqlen=24)
    outcome = bitmill.train(
        folders("uniform"), teacher=teacher, calib=text, loss=loss, out=tmp_path / "out", held_apart=4, tokens=48
    )
    assert outcome.report["trained"]["windows"]["source"] == "self"
    assert outcome.summary["after"]["perplexity"] <= outcome.summary["before"]["perplexity"] * 1.1


def test_no_time_keeps_the_start(folders, teacher, windows, tmp_path):
    outcome = bitmill.train(
        folders("uniform"), teacher=teacher, calib=windows, out=tmp_path / "out", max_minutes=1e-9
    )
    assert (outcome.summary["steps"], outcome.summary["best_step"]) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": None}, "does not tell where that is; name it with --teacher"),
        ({"rate": 0.0}, "rate is 0.0; use a number above 0"),
        ({"loss": "mse"}, "loss is 'mse'; use 'kl' or 'next-token'"),
        ({"teacher": "no/such/model"}, "teacher cannot be opened"),
        (
            {"teacher": "no/such/model", "calib": bitmill.CalibrationData("self", 12, 24)},
            "teacher cannot be opened",
        ),
        ({"tokens": 4096}, "A step reads 4096 tokens, 128 windows of 32, and the text leaves 32 to train on"),
    ],
)
def test_refusals_of_train(folders, teacher, windows, tmp_path, changes, sentence):
    arguments = {"teacher": teacher, "calib": windows, "out": tmp_path / "out", **changes}
    with pytest.raises(BitmillError, match=sentence):
        bitmill.train(folders("uniform"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_vocabulary_is_refused(folders, windows, tmp_path):
    other = tiny_model("llama", vocab_size=130)
    with pytest.raises(UsageError, match=r"vocabulary of 130 and .* one of 128"):
        bitmill.train(folders("uniform"), teacher=other, calib=windows, out=tmp_path / "out")


def test_refusals_of_the_command(tmp_path, capsys):
    source, text = save_model(tmp_path / "source"), write_text(tmp_path / "text.txt")
    folder = tmp_path / "q"
    bitmill.quantize(source, "rtn", bits=3, group_size=32, out=folder, measure=0)
    capsys.readouterr()
    assert main(["train", str(source), "--teacher", str(source), "-o", str(tmp_path / "x")]) == 1
    assert "holds a float model" in capsys.readouterr().err
    short = ["train", folder, "--teacher", source, "--calib", text, "--seqlen", 64, "--samples", 4]
    text.write_text("w1 w2 w3")
    assert main([*map(str, short), "--held-apart", "1", "-o", str(tmp_path / "x")]) == 1
    assert "a window needs more than" in capsys.readouterr().err


def test_a_resumed_training_gives_equal_bytes(folders, teacher, windows, tmp_path, monkeypatch):
    options = {"teacher": teacher, "calib": windows[:14], "held_apart": 4, "rate": 3e-3, "tokens": 64}
    bitmill.train(folders("uniform"), out=tmp_path / "whole", **options)
    out, save, saves = tmp_path / "resumed", TrainingJournal.save, []

    def interrupted(self, tensors, data):
        save(self, tensors, data)
        saves.append(data["steps"])
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingJournal, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bitmill.train(folders("uniform"), out=out, **options)
    with pytest.raises(OutputError, match="continue it with --resume"):
        bitmill.train(folders("uniform"), out=out, **options)
    journal = tmp_path / "resumed.partial" / "journal.json"
    written = journal.read_text()
    write_json(journal, {**json.loads(written), "data": {"steps": 0}})
    with pytest.raises(CheckpointError, match=r"cannot be read \(journal.json was altered\)"):
        bitmill.train(folders("uniform"), out=out, resume=True, **options)
    journal.write_text(written)
    with pytest.raises(CheckpointError, match=r"its options.rate was 0.003 and is now 0.001"):
        bitmill.train(folders("uniform"), out=out, resume=True, **{**options, "rate": 1e-3})
    with pytest.raises(CheckpointError, match=r"its windows.sha256 was"):
        bitmill.train(folders("uniform"), out=out, resume=True, **{**options, "calib": windows[1:15]})
    with pytest.raises(CheckpointError, match=r"its folder|its files"):
        bitmill.train(folders("codebook"), out=out, resume=True, **options)
    bitmill.train(folders("uniform"), out=out, resume=True, **options)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("whole", "resumed")] == []
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_float_model_is_quantized_and_trained_in_one_command(tmp_path, capsys):
    source, text = save_model(tmp_path / "source"), write_text(tmp_path / "text.txt")
    out, windows = tmp_path / "out", ["--calib", str(text), "--samples", "12", "--seqlen", "24"]
    words = ["train", str(source), "--method", "efficientqat", "--bits", "2", "--group-size", "32"]
    phase = ["--loss", "next-token", "--learn", "scales", "--held-apart", "2", "--tokens", "24"]
    assert main([*words, "--set", "epochs=1", *phase, *windows, "-o", str(out)]) == 0
    start, trained = open_checkpoint(tmp_path / "out-start"), open_checkpoint(out)
    assert start.report["recipe"]["name"] == "efficientqat"
    figures = trained.report["trained"]
    assert figures["after"]["perplexity"] < figures["before"]["perplexity"]
    for name in start.entries:
        equal = torch.equal(start.tensor(name), trained.tensor(name))
        assert equal or name.endswith(".scale")
    capsys.readouterr()
    assert main(["train", str(source), "--bits", "2", "-o", str(tmp_path / "x")]) == 2
    assert "name the method with --method" in capsys.readouterr().err
    assert main([*words, *windows, "-o", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(out)
    other = [word.replace("efficientqat", "rtn") for word in words]
    assert main([*other, *phase, *windows, "--resume", "-o", str(out)]) == 1
    assert re.search(r"out-start is finished already, but its .* was .* and is now", capsys.readouterr().err)
