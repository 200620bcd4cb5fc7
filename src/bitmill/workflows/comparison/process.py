"""Run one variant in its own process, and receive its progress and result."""

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

from bitmill.files import new_file, output_errors
from bitmill.progress import Progress

# -P: a file in the current directory must not be taken for a module
WORKER = (sys.executable, "-P", "-m", "bitmill.workflows.comparison.worker")


class VariantFailed(Exception):
    """A variant has no result; the message is one sentence."""


def run_variant(folder: Path, name: str, log: Path, progress: Progress) -> dict[str, Any]:
    """Run one variant in a worker process and return its result.

    Args:
        folder: folder of the comparison, with grid.json.
        name: the variant, or `float`.
        log: receives stderr of the process; deleted unless it failed with output.
        progress: receives the progress of the worker.

    Raises:
        VariantFailed: with the worker's message, or the way in which the process ended.
    """
    message: dict[str, Any] = {}
    with output_errors(log):
        new_file(log)
    try:
        with log.open("w") as errors, _worker([str(folder), name], errors) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message |= handle_message(line, progress, name)
            status = process.wait()
    finally:
        progress.finish()
        if "result" in message or not log.stat().st_size:
            log.unlink()
    if "result" not in message:
        raise VariantFailed(message.get("failed") or _exit_reason(status, log))
    return dict(message["result"])


@contextmanager
def _worker(arguments: list[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a worker and kill it when the block ends.

    It has its own session: Ctrl-C reaches only this process, which ends the worker. If this process is killed, the
    worker's stdin closes and it exits.
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


def exit_with_parent(stdin: IO[str]) -> None:
    """Block until stdin closes, which is when the parent process has ended, then exit."""
    stdin.read()
    os._exit(1)


def handle_message(line: str, progress: Progress, name: str) -> dict[str, Any]:
    """Handle one line of a worker: forward progress, and return any other message.

    Args:
        line: a JSON object; other text is ignored.
        progress: receives the worker's tasks, steps and memory.
        name: the variant, as prefix of its tasks.
    """
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


def _exit_reason(status: int, log: Path) -> str:
    """Return one sentence about a process that ended without a message."""
    hint = f"; see {log.name} next to its record" if log.exists() else ""
    if status == -signal.SIGKILL:
        return f"Its process was killed (SIGKILL), most likely because the machine ran out of memory{hint}."
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"Its process died of {name}{hint}."
    return f"Its process ended with status {status} and without a result{hint}."
