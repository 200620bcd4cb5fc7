"""Progress on stderr: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from bitmill.progress.base import Progress, peak_memory_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SHOW_AFTER_S = 2.0  # shorter work shows nothing
LINE_EVERY_S = 5.0
_log = logging.getLogger("bitmill")
DUMB = ("dumb", "unknown")  # values of TERM


class TerminalProgress(Progress):
    """Draws the current task once it has lasted longer than SHOW_AFTER_S.

    A task of 0 steps has an unknown length (opening a model): its bar is indeterminate. The remaining time comes
    from the finished steps, and before the first one from what was expected.
    """

    shown = True

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._bar: Bar | None = None
        self._task, self._total, self._done, self._figures = "", 0, 0, ""
        self._started = self._last_line = self._last_step = 0.0
        self._expected: dict[str, float] = {}
        # a dumb terminal cannot move its cursor, so it gets lines, as a pipe does
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in DUMB
        self._worker_peak_bytes: int | None = None

    def start(self, task: str, total: int) -> None:
        """Begin a task; nothing is drawn yet."""
        with self._lock:
            self.finish()
            _log.debug("begins: %s (%d steps)", task, total)
            self._task, self._total, self._done, self._figures = task, total, 0, ""
            self._started = self._last_step = time.monotonic()
            self._last_line = 0.0
            # a timer, because a task that only loads reports no steps
            self._timer = threading.Timer(SHOW_AFTER_S, self._appear)
            self._timer.daemon = True
            self._timer.start()

    def advance(self, steps: int = 1) -> None:
        """Move the bar, or print a line if the last one is old enough."""
        with self._lock:
            self._done += steps
            self._last_step = time.monotonic()
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done, memory=self._memory())
            elif not self._terminal:
                self._print_line()

    def describe(self, text: str) -> None:
        """Show figures behind the name of the task, from the next step on."""
        with self._lock:
            self._figures = f", {text}"
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], description=self._task + self._figures)

    def expect(self, task: str, seconds: float) -> None:
        """Show this time for a task until its first step is finished."""
        self._expected[task] = seconds

    def seconds_left(self) -> float | None:
        """Return the time until the task ends, None where it is unknown; steps are taken to last equally long."""
        elapsed, left = time.monotonic() - self._started, self._total - self._done
        if not self._total or left <= 0:
            return None
        if self._done:
            each = (self._last_step - self._started) / self._done
            return max(0.0, each * left - (time.monotonic() - self._last_step))
        if self._task in self._expected:
            return max(0.0, self._expected[self._task] - elapsed)
        return None

    def finish(self) -> None:
        """End the task; the bar of a task with a known length stays on the screen."""
        with self._lock:
            if self._timer is not None:
                elapsed, memory = time.monotonic() - self._started, self._memory()
                _log.debug("ended: %s after %.3f s, peak memory %s", self._task, elapsed, memory)
                self._timer.cancel()
                self._timer = None
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], memory=self._memory())
                self._bar.stop()
                self._bar = None

    def note(self, sentence: str) -> None:
        """Print a sentence in place of the current task's bar."""
        self.finish()
        print(sentence, file=sys.stderr, flush=True)

    def note_memory(self, size_bytes: int) -> None:
        """Show this peak memory, of a worker process, in place of this process's own."""
        self._worker_peak_bytes = size_bytes

    def _memory(self) -> str:
        return f"{(self._worker_peak_bytes or peak_memory_bytes()) / 1e9:.2f} GB"

    def _appear(self) -> None:
        with self._lock:
            if self._timer is None:  # finished while this thread started
                return
            if self._terminal:
                self._bar = _bar(self._total, self.seconds_left)
                self._bar.add_task(
                    self._task + self._figures,
                    total=self._total or None,
                    completed=self._done,
                    memory=self._memory(),
                )
                self._bar.tasks[0].start_time = self._started  # includes the time before the bar was drawn
                self._bar.start()
            else:
                self._print_line()

    def _print_line(self) -> None:
        """Print at most one line per LINE_EVERY_S, and none in the first SHOW_AFTER_S."""
        now = time.monotonic()
        elapsed = now - self._started
        if elapsed < SHOW_AFTER_S or now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        line = f"{self._task} {self._done}/{self._total}" if self._total else self._task
        line += f"{self._figures}, {elapsed:.0f} s"
        if (left := self.seconds_left()) is not None:
            line += f", about {left:.0f} s left"
        print(f"{line}, peak memory {self._memory()}", file=sys.stderr, flush=True)


@contextmanager
def displayed(given: Progress | bool | None) -> Iterator[Progress]:
    """Yield the progress of a call in Python, and end its display also after an error; see `progress_for`."""
    progress = progress_for(given)
    try:
        yield progress
    finally:
        progress.finish()


def progress_for(given: Progress | bool | None) -> Progress:
    """Return the progress of a call in Python.

    Args:
        given: a progress; True displays one, False none; None displays one on a terminal and in a notebook.
    """
    if given is None:
        given = sys.stderr.isatty() or "ipykernel" in sys.modules
    if isinstance(given, bool):
        return TerminalProgress() if given else Progress()
    return given


def _bar(total: int, seconds_left: Callable[[], float | None]) -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Left(ProgressColumn):
        """The remaining time; rich's own column forgets steps that are half a minute old."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            left = 0.0 if task.finished else seconds_left()
            return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), "progress.remaining")

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    if total:
        columns.append(MofNCompleteColumn())
    columns.append(TimeElapsedColumn())
    if total:
        columns += [TextColumn("eta"), Left()]
    columns.append(TextColumn("peak memory {task.fields[memory]}"))
    return Bar(*columns, console=Console(stderr=True), transient=not total, redirect_stdout=False)
