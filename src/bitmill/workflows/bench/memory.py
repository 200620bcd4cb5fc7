"""What the machine's memory can deliver, which is what a kernel of one token is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bitmill.runtime.native import is_available, native, threads

_CACHE_BYTES = 64 << 20  # where the system does not tell


def cache_bytes() -> int:
    """The largest cache of the first core."""
    found = [_CACHE_BYTES // 2]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        found.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1))
    return max(found)


def cold_bytes() -> int:
    """How much must be read in turns for none of it to be left in a cache when its turn comes again."""
    return max(4 * cache_bytes(), 128 << 20)


class ReadBandwidth:
    """Reads a buffer that no cache holds, with all threads."""

    def __init__(self) -> None:
        self.buffer = torch.ones(cold_bytes() // 8, dtype=torch.int64)

    def measure(self) -> float:
        """Bytes a second of one pass."""
        return self.buffer.nbytes / timed(self._read)

    def _read(self) -> None:
        if is_available():
            native().read_all(self.buffer.view(torch.uint8), threads())
        else:
            self.buffer.sum()


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def copies_of(size_bytes: int) -> int:
    """How many copies of something to rotate over, at least 2."""
    return max(2, -(-cold_bytes() // max(1, size_bytes)))


def linear_time(weights: list[Tensor], x: Tensor) -> float:
    """Seconds of one torch linear layer, in turns over copies of its weight (out, in)."""
    return timed(lambda: [torch.nn.functional.linear(x, W) for W in weights]) / len(weights)
