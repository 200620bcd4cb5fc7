"""bitmill sweep, run through the command line."""

from __future__ import annotations

import json

from bitmill.cli.main import main


def test_as_json(workspace, capsys):
    assert main(["sweep", str(workspace.source), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["measured"] is None
    assert len(data["cells"]) == 34
    assert data["verdicts"][-1].startswith("smallest fair: ")


def test_for_people(workspace, capsys):
    text = ["--text", str(workspace.text), "--windows", "2", "--seqlen", "16", "--search"]
    assert main(["sweep", str(workspace.source), *text]) == 0
    out = capsys.readouterr().out
    for word in ("2 x 16 tokens", "shrunk", "smallest safe", "4 bits: ", "nvfp4 in groups of 16: ", "ppl", "KL"):
        assert word in out


def test_activations(workspace, capsys):
    calib = ["--activations", "--calib", str(workspace.text), "--windows", "2", "--seqlen", "16"]
    assert main(["sweep", str(workspace.source), *calib]) == 0
    out = capsys.readouterr().out
    for word in (
        "2 x 16 tokens",
        "errors of outputs",
        "smallest safe",
        "4 bits asymmetric: ",
        "per token",
        "bits/i",
    ):
        assert word in out
    assert main(["sweep", str(workspace.source), "--calib", str(workspace.text)]) == 2
    assert "--activations" in capsys.readouterr().err


def test_windows_require_text(workspace, capsys):
    assert main(["sweep", str(workspace.source), "--windows", "3"]) == 2
    assert "--text" in capsys.readouterr().err
