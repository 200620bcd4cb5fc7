"""bitmill compare, killed and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitmill.cli.main import main
from bitmill.report.results import read_results
from helpers.comparisons import command, names


def processes_of(folder: Path) -> list[int]:
    """Workers of a comparison that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"bitmill.workflows.comparison.worker" in words and str(folder).encode() in words:
            found.append(int(entry.name))
    return found


def wait_for(condition, what: str, limit_s: float = 120.0):
    started = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - started < limit_s, what
        time.sleep(0.05)
    return value


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_killed_and_continued(workspace, broken, quick, capsys):
    """A grid with a cell that fails, each in its own process; then the whole is killed, and continued here."""
    grid = workspace.root / "grid"
    arguments = command(workspace, "--recipes", broken)
    arguments[arguments.index("-o") + 1] = str(grid)
    start = [sys.executable, "-m", "bitmill.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(start, cwd=workspace.root, env=environment, stderr=subprocess.DEVNULL)
    wait_for((grid / "cells" / "rtn-3bit.json").exists, "the first cell")
    wait_for(lambda: processes_of(grid), "the second cell")
    killed.kill()
    killed.wait()
    wait_for(lambda: not processes_of(grid), "the child to notice")
    before = read_results(grid / "results.json")
    assert [v.status for v in before.variants[:2]] == ["done", "pending"]
    assert before.variants[0].peak_memory_bytes > 1e8  # torch alone
    assert (grid / "float.npy").exists()

    assert main(arguments) == 1  # for the cell that fails
    found = read_results(grid / "results.json")
    assert found.variants[0] == before.variants[0]
    assert found.float == before.float
    assert [v.status for v in found.variants] == ["done"] * 4 + ["failed"]
    assert "gptq-4bit" in capsys.readouterr().out
    assert not (grid / "float.npy").exists()
    assert not [name for name in names(grid) if name.endswith((".state", ".tmp"))]
