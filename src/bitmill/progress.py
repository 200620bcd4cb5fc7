"""What long work reports while it runs; the command line draws it, a library caller may ignore it."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


class Progress:
    """Receives the state of long work. This base class ignores it."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` steps begins, 0 where that is not known; it ends the task before it."""

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current task are done."""

    def finish(self) -> None:
        """The current task is over."""

    def note(self, sentence: str) -> None:
        """Something that whoever waits for the work should know."""

    def note_memory(self, size_bytes: int) -> None:
        """The work is done in another process, whose highest memory so far this is."""


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, bytes.

    From Linux's VmHWM: its ru_maxrss begins at what the process had that started this one.
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
    """Highest resident memory so far of a process, by its number, bytes; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
