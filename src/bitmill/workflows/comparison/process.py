"""Run one cell in a process of its own, follow its progress, and say what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bitmill.progress import Progress

WORKER = (sys.executable, "-m", "bitmill.workflows.comparison.worker")


class CellFailed(Exception):
    """A cell came to nothing; the message is one sentence."""


def run_cell(folder: Path, name: str, log: Path, progress: Progress) -> dict[str, Any]:
    """The result of one cell. What its process prints on stderr is kept in `log` when it fails.

    Raises CellFailed with what the process said, or with how it died.
    """
    said: dict[str, Any] = {}
    try:
        with log.open("w") as errors, _worker([str(folder), name], errors) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said |= _follow(line, progress, name)
            status = process.wait()
    finally:
        progress.finish()
        if "result" in said or not log.stat().st_size:
            log.unlink()
    if "result" not in said:
        raise CellFailed(said.get("failed") or _how_it_died(status, log))
    return dict(said["result"])


@contextmanager
def _worker(arguments: list[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """A worker that ends with the block, however the block ends.

    It has a session of its own: Ctrl-C reaches us alone, and we end it. If we are killed its stdin ends, and it
    ends itself.
    """
    process = subprocess.Popen(
        [*WORKER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def end_with(stdin: IO[str]) -> None:
    """In the worker: wait until whoever started it is gone, and end it."""
    stdin.read()
    os._exit(1)


def _follow(line: str, progress: Progress, name: str) -> dict[str, Any]:
    """Take in one line of a worker: progress is passed on, anything else returned."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(message, dict):
        return {}
    if "memory" in message:
        progress.note_memory(int(message["memory"]))
    if "steps" in message:
        progress.advance(int(message["steps"]))
    elif "task" in message:
        if message["task"] is None:
            progress.finish()
        else:
            progress.start(f"{name}: {message['task']}", int(message["total"]))
    else:
        return message
    return {}


def _how_it_died(status: int, log: Path) -> str:
    """One sentence about a process that said nothing."""
    where = f"; see {log.name} beside its record" if log.exists() else ""
    if status == -signal.SIGKILL:
        return f"Its process was killed (SIGKILL), most likely because the machine ran out of memory{where}."
    if status < 0:
        try:
            how = signal.Signals(-status).name
        except ValueError:
            how = f"signal {-status}"
        return f"Its process died of {how}{where}."
    return f"Its process ended with status {status} and without a result{where}."
