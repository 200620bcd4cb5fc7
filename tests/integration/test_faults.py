"""Errors are one sentence that names the cause, and no file is lost.

For every fault: the exit status is not 0, stdout is empty (with --json: the error), stderr is one line, no
existing file changes, and the output folder is not created.
"""

from __future__ import annotations

import json

import pytest

from bitmill.cli.main import main
from helpers.faults import Fault, disk, folder, model, options, resume, text
from helpers.workspace import snapshot

SUBJECTS = (disk, model, text, options, resume, folder)
FAULTS: dict[str, Fault] = {name: spoil for subject in SUBJECTS for name, spoil in subject.fault.items()}

# a tenth is enough to see that --json changes nothing but stdout
CASES = [(name, False) for name in FAULTS] + [(name, True) for name in list(FAULTS)[::10]]


@pytest.mark.parametrize(("name", "as_json"), CASES, ids=[n + " --json" * j for n, j in CASES])
def test_fault(name, as_json, workspace, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        command, words = FAULTS[name](workspace, patch)
        if as_json and command[0] not in ("chat", "quantise"):
            command = [*command, "--json"]
        before = snapshot(workspace.root)
        existed = workspace.out.exists()
        capsys.readouterr()
        status = main(command)
    out, err = capsys.readouterr()
    assert status in (1, 2), err
    if "--json" in command:
        error = json.loads(out)["error"]
        assert (error["exit_code"], f"error: {error['message']}\n") == (status, err)
    else:
        assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.rstrip().endswith((".", ";"))
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err
    after = snapshot(workspace.root)
    assert {k: v for k, v in after.items() if k in before} == before
    assert workspace.out.exists() == existed
    assert not [k for k in after if k not in before and not k.startswith("out.partial/")]
