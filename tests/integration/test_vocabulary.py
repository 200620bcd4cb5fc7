"""Tokens that a model has no embedding for are refused by name, wherever text is read."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

import bitmill
from bitmill.cli.main import main
from bitmill.errors import BitmillError
from helpers.tiny_models import tiny_model
from helpers.workspace import WORDS

REASON = f"token {WORDS + 3}, but the model's ids are 0 and up below {WORDS + 3}"


@pytest.fixture
def extended(workspace):
    """A tokenizer with one token more than the model has embeddings, in the source and in a quantized folder."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(workspace.source)
    shutil.rmtree(workspace.done)
    assert (
        main(["quantize", "source", "--method", "rtn", "--group-size", "16", "--measure", "0", "-o", "done"]) == 0
    )
    workspace.text.write_text("w1 w2 w3 <tool> " * 500)
    return workspace


COMMANDS = {
    "calibration": ["quantize", "source", "--method", "gptq", "--calib", "text.txt", "--measure", "0", "-o",
                    "out"],
    "measurement": ["quantize", "source", "--method", "rtn", "--calib", "text.txt", "-o", "out"],
    "eval": ["eval", "source", "--text", "text.txt"],
    "eval packed cache": ["eval", "done", "--text", "text.txt", "--kv", "kvquant", "--kv-seqlen", "16"],
    "eval reference": ["eval", "done", "--text", "text.txt", "--reference", "source"],
    "sweep": ["sweep", "source", "--text", "text.txt"],
    "compare": ["compare", "source", "--methods", "rtn", "--bits", "4", "--calib", "text.txt", "-o", "out"],
    "kv": ["quantize", "source", "--method", "none", "--kv", "kvquant", "--kv-seqlen", "16", "--calib", "text.txt",
           "-o", "out"],
    "kv in place": ["quantize", "done", "--method", "none", "--kv", "kvquant", "--kv-seqlen", "16", "--calib",
                    "text.txt"],
    "generate": ["generate", "source", "--prompt", "w1 <tool>"],
    "generate raw": ["generate", "done", "--raw", "--prompt", "w1 <tool>"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands(command, extended, capsys):
    short = [] if command[0] == "generate" else ["--seqlen", "16"]
    assert main([*command, *short]) in (1, 2)
    assert REASON in capsys.readouterr().err
    assert not list(extended.root.glob("out*"))


def test_chat_template(extended, capsys, monkeypatch):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        file = extended.source / name
        if file.is_file() and name.endswith(".jinja"):
            file.write_text("<tool>" + file.read_text())
        elif file.is_file():
            data = json.loads(file.read_text())
            if "chat_template" in data:
                file.write_text(json.dumps({**data, "chat_template": "<tool>" + data["chat_template"]}))
    assert main(["generate", "source", "--prompt", "w1"]) == 2
    assert REASON in capsys.readouterr().err


@pytest.mark.parametrize(
    ("calibration", "source"),
    [("text.txt", "text.txt"), (["w1 w2 w3 . " * 60, "w4 w5 w6 . " * 60], "texts passed by the caller")],
)
def test_calibration_as_everyone_gives_it(workspace, calibration, source):
    """The name of a source, or a list of texts."""
    options = {"bits": 4, "group_size": 16}
    data = bitmill.CalibrationData(calibration, samples=2, seqlen=16)
    expected = bitmill.quantize("source", "gptq", out="a", calib=data, measure=1, **options)
    assert expected.report["identity"]["calibration"]["source"] == source
    assert expected.report["measured"][0]["text"] == source
    assert main(["verify", "a"]) == 0
    assert bitmill.evaluate("a", text=calibration, seqlen=16, windows=1)["text"] == source


@pytest.mark.parametrize("given", ["text.txt", ["w1 w2 w3 . " * 500] * 2], ids=["name", "texts"])
def test_calibration_without_data_class(workspace, given, monkeypatch):
    monkeypatch.setattr(bitmill.CalibrationData.__init__, "__defaults__", ("pydoc", 2, 16, 0))
    assert bitmill.quantize("source", "gptq", out="b", calib=given, group_size=16, measure=0).out.is_dir()


@pytest.mark.parametrize("given", [5, [], [1, 2], b"pydoc", {"source": "pydoc"}, [["w1"]]])
def test_other_calibration_refused(given):
    with pytest.raises(BitmillError, match=r"^The text is .*\.$"):
        bitmill.quantize(tiny_model("llama"), "gptq", calib=given)


@pytest.mark.parametrize("changes", [{"seed": 10**20}, {"samples": 10**10}, {"seqlen": 1.5}, {"samples": True}])
def test_numbers_refused(changes):
    with pytest.raises(BitmillError, match=r"\.$"):
        bitmill.CalibrationData(**changes)


def test_home(workspace, monkeypatch, capsys):
    """~ in every path, where no shell replaced it."""
    monkeypatch.setenv("HOME", str(workspace.root))
    data = bitmill.CalibrationData("~/text.txt", samples=2, seqlen=16)
    (workspace.root / "mine.yaml").write_bytes((workspace.done / "recipe.yaml").read_bytes())
    done = bitmill.quantize("~/source", "~/mine.yaml", out="~/new", calib=data, measure=1)
    assert done.out == workspace.root / "new"
    assert main(["inspect", "~/new"]) == 0
    assert main(["eval", "~/new", "--record", "--text", "text.txt", "--seqlen", "16", "--windows", "1"]) == 0
    assert main(["plan", "~/source"]) in (0, 1)
    assert not list(workspace.root.glob("~*"))
