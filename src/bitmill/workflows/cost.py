"""Seconds and memory of a piece of work, measured."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from bitmill.progress import Progress

_SAMPLE_EVERY_S = 0.005


@dataclass(frozen=True)
class Cost:
    """Seconds of a piece of work: on the clock, and of all processors together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, other: Cost) -> Cost:
        """Return the difference; no cost is below zero."""
        return Cost(max(0.0, self.seconds - other.seconds), max(0.0, self.cpu_seconds - other.cpu_seconds))

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, self.cpu_seconds * times)


def now() -> Cost:
    """Return the readings of both clocks."""
    return Cost(time.perf_counter(), time.process_time())


class Clock(Progress):
    """Costs by name: of each phase that reports progress, and of what runs inside `measure`."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self._phase, self._since = "", now()

    def start(self, task: str, total: int) -> None:
        """Begin a phase, which ends the one before."""
        self.finish()
        self._phase = task

    def finish(self) -> None:
        """End the phase."""
        read = now()
        self.costs[self._phase] += read - self._since
        self._phase, self._since = "", read

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the cost of a with-block to a name."""
        began = now()
        try:
            yield
        finally:
            self.costs[name] += now() - began


class PeakMemory:
    """The highest resident memory of this process inside a with-block, by samples."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._process, self._ended = psutil.Process(), threading.Event()

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.size_bytes = max(self.size_bytes, self._process.memory_info().rss)
            if self._ended.wait(_SAMPLE_EVERY_S):
                return
