"""Folders that commands name themselves, and folders that they replace."""

from __future__ import annotations

import json

import pytest

import bitmill
from bitmill.cli.main import main
from bitmill.errors import OutputError
from bitmill.workflows.names import model_name
from helpers.workspace import interrupted_after, snapshot


def without_out(command):
    at = command.index("-o")
    return command[:at] + command[at + 2 :]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("org/Name-1B@v2.0", "Name-1B"),
        ("models/x.Q4_1.gguf", "x.Q4_1"),
        ("strange name!", "strange-name"),
        ("/", "model"),
    ],
)
def test_model_name(model, name):
    assert model_name(model) == name


def test_named_by_model_method_and_bits(workspace, capsys):
    command = [*without_out(workspace.quantize("--bits", "3")), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "source-gptq-3bit"
    before = snapshot(workspace.root)
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert snapshot(workspace.root) == before
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] is None


def test_keys_and_values_alone(workspace, capsys):
    command = without_out(workspace.quantize("--kv", "per_token", method="none"))
    words = [word for word in command if word not in ("--group-size", "16")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "source-kv-per_token-8bit"


def test_overwrite(workspace):
    command = workspace.quantize("--bits", "3", "--overwrite", out=workspace.done)
    before = snapshot(workspace.done)
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(1, patch)
        assert main(command) == 130
    assert snapshot(workspace.done) == before
    assert main([*command, "--resume"]) == 0
    assert main(workspace.quantize("--bits", "3")) == 0
    assert snapshot(workspace.done) == snapshot(workspace.out)
    assert not workspace.done.with_name("done.partial").exists()


def test_overwrite_of_nothing(workspace):
    assert main(workspace.quantize("--overwrite")) == 0
    assert snapshot(workspace.out) == snapshot(workspace.done)


@pytest.mark.parametrize("kind", ["source", "foreign file", "damaged", "link", "file"])
def test_overwrite_spares_what_bitmill_did_not_write(kind, workspace):
    out = workspace.done
    if kind == "source":
        out = workspace.source
    elif kind == "foreign file":
        (out / "notes.txt").write_text("mine")
    elif kind == "damaged":
        (out / "config.json").write_text("{}")
    elif kind == "link":
        out = workspace.root / "link"
        out.symlink_to(workspace.done)
    else:
        out = workspace.text
    before = snapshot(workspace.root)
    with pytest.raises(OutputError, match="overwrite"):
        bitmill.quantize(workspace.source, "rtn", out=out, measure=0, overwrite=True)
    assert snapshot(workspace.root) == before


def test_overwrite_by_a_calibrated_copy(workspace):
    source = workspace.root / "copy"
    bitmill.quantize(workspace.done, "none", kv="per_token", out=source)
    with pytest.raises(OutputError, match="overwrite"):
        bitmill.quantize(workspace.done, "none", kv="rotated", out=source)
    outcome = bitmill.quantize(workspace.done, "none", kv="rotated", out=source, overwrite=True)
    assert outcome.summary["kv"]["method"]["kv method"] == "rotated"
