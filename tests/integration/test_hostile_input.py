"""No bad input of the command line or of a file ends in an internal error: one sentence, exit 1 or 2."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings

from bitmill.cli.main import main
from bitmill.workflows.comparison import run
from helpers.comparisons import in_this_process
from helpers.hostile import Command, calls, commands

EXAMPLES = int(os.environ.get("BITMILL_HOSTILE_EXAMPLES", "3"))  # of every command
HANG_S = 30


def hang(*_):
    raise RuntimeError(f"no end within {HANG_S} s")


@contextlib.contextmanager
def bounded():
    """Raise where the block takes too long."""
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(words: list[str]) -> tuple[int, str]:
    """Run a command here; returns its exit status and its stderr."""
    with bounded(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return status, err.getvalue()


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.words))
def test_commands(command: Command, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(run.run_grid, "__kwdefaults__", {**run.run_grid.__kwdefaults__, "run": in_this_process})
    monkeypatch.setattr(
        "bitmill.workflows.bench.memory.cold_bytes", lambda: 1 << 12
    )  # for a quick `bench kernels`
    monkeypatch.setattr("bitmill.workflows.bench.formats.SHAPE", (2, 256))
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))
    here = tmp_path / "here"

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(calls(command))
    def check(words: list[str]) -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(pristine, here, ignore=shutil.ignore_patterns("pipe"))
        os.mkfifo(here / "pipe")
        monkeypatch.chdir(here)
        status, err = call(words)
        assert status in (0, 1, 2), err
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status != 0), err
        assert all(line.endswith((".", "...")) for line in errors), err

    check()
