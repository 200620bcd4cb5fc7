"""The contract of a progress, and the peak memory of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


class Progress:
    """Receives the progress of long work; this base class ignores it.

    shown: somebody sees it, so that an estimate before long work is worth its time.
    """

    shown = False

    def expect(self, task: str, seconds: float) -> None:
        """Report about how long a task that begins later will take."""

    def start(self, task: str, total: int) -> None:
        """Begin a task, which ends the previous one.

        Args:
            task: its name.
            total: number of steps; 0 where it is unknown.
        """

    def advance(self, steps: int = 1) -> None:
        """Report finished steps of the current task."""

    def describe(self, text: str) -> None:
        """Report figures of the current task, such as a loss."""

    def finish(self) -> None:
        """End the current task."""

    def note(self, sentence: str) -> None:
        """Show a sentence to the user."""

    def note_memory(self, size_bytes: int) -> None:
        """Report the peak memory so far of another process that does the work."""


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far, bytes.

    From Linux's VmHWM, because ru_maxrss there starts at that of the parent process.
    """
    if (own := high_water_mark()) is not None:
        return own
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)


def high_water_mark(process: int | str = "self") -> int | None:
    """Return the highest resident memory of a process so far, bytes; None where the system does not report it."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
