"""Progress is shown for long tasks only."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from bitmill.progress import Progress, high_water_mark, peak_memory_bytes
from bitmill.progress import terminal as module
from bitmill.progress.terminal import TerminalProgress, progress_for


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def capture(monkeypatch, terminal: bool) -> Stream:
    """Inside the test: pytest puts its own stderr back after fixtures have run."""
    stream = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def work(steps: int, total: int | None = None) -> None:
    progress = TerminalProgress()
    progress.start("grind", steps if total is None else total)
    for _ in range(steps):
        time.sleep(0.02)
        progress.advance()
    progress.finish()


@pytest.mark.parametrize("terminal", [False, True])
def test_short_task_is_silent(terminal, monkeypatch):
    stderr = capture(monkeypatch, terminal)
    work(5)
    assert stderr.getvalue() == ""


def test_few_lines_in_pipe(monkeypatch):
    stderr = capture(monkeypatch, False)
    monkeypatch.setattr(module, "SHOW_AFTER_S", 0.1)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.2)
    work(30)
    lines = stderr.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("grind ") and "/30" in line and "peak memory" in line for line in lines)
    assert "s left" in lines[0]


@pytest.mark.parametrize("terminal", [False, True])
def test_figures_of_the_task(terminal, monkeypatch):
    stderr = capture(monkeypatch, terminal)
    monkeypatch.setattr(module, "SHOW_AFTER_S", 0.01)
    progress = TerminalProgress()
    progress.start("train", 3)
    progress.describe("loss 0.5")
    time.sleep(0.05)
    progress.advance()
    progress.finish()
    assert ", loss 0.5" in stderr.getvalue()


def test_unknown_length_reports(monkeypatch):
    stderr = capture(monkeypatch, False)
    monkeypatch.setattr(module, "SHOW_AFTER_S", 0.05)
    progress = TerminalProgress()
    progress.start("loading", 0)
    time.sleep(0.2)
    progress.finish()
    assert stderr.getvalue().startswith("loading, 0 s, peak memory")


def on_a_terminal(term: str, total: int, monkeypatch) -> str:
    stderr = capture(monkeypatch, True)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(module, "SHOW_AFTER_S", 0.05)
    work(20, total)
    return stderr.getvalue()


@pytest.mark.parametrize("total", [20, 0], ids=["counted", "unknown length"])
def test_bar_on_terminal(total, monkeypatch):
    shown = on_a_terminal("xterm", total, monkeypatch)
    assert "grind" in shown
    assert ("20/20" in shown) == bool(total)


@pytest.mark.parametrize("total", [20, 0], ids=["counted", "unknown length"])
def test_dumb_terminal(total, monkeypatch):
    shown = on_a_terminal("dumb", total, monkeypatch)
    assert shown.startswith("grind")
    assert "\x1b" not in shown


def test_next_task_ends_previous(monkeypatch):
    stderr = capture(monkeypatch, False)
    monkeypatch.setattr(module, "SHOW_AFTER_S", 30.0)
    progress = TerminalProgress()
    timers = []
    for task in range(4):
        progress.start(f"task {task}", 0)
        timers.append(progress._timer)
    progress.finish()
    assert all(timer.finished.is_set() for timer in timers)
    assert stderr.getvalue() == ""


def test_base_progress_is_silent():
    progress = Progress()
    progress.start("x", 1)
    progress.advance()
    progress.finish()
    assert peak_memory_bytes() > 1_000_000


@pytest.mark.skipif(high_water_mark() is None, reason="a system without VmHWM")
def test_peak_memory_of_child() -> None:
    ballast = b"x" * (200 << 20)
    code = "from bitmill.progress import peak_memory_bytes; print(peak_memory_bytes())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) < peak_memory_bytes() - len(ballast) // 2


def test_remaining_time(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    progress = TerminalProgress()
    progress.expect("quantize", 300)
    progress.start("quantize", 10)
    clock[0] += 60
    assert progress.seconds_left() == 240  # as expected, before the first step
    clock[0] += 20
    progress.advance()
    assert progress.seconds_left() == 9 * 80
    clock[0] += 50  # a step that lasts falls by the second
    assert progress.seconds_left() == 9 * 80 - 50
    progress.finish()
    progress.start("other", 10)
    assert progress.seconds_left() is None
    progress.finish()


def test_progress_in_python(monkeypatch) -> None:
    own = Progress()
    assert progress_for(own) is own
    assert isinstance(progress_for(True), TerminalProgress)
    for terminal in (False, True):
        capture(monkeypatch, terminal)
        assert isinstance(progress_for(None), TerminalProgress) == terminal
        assert not isinstance(progress_for(False), TerminalProgress)
