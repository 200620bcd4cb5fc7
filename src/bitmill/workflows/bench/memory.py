"""The read bandwidth of the memory, the limit of a kernel of one token, and timing with cold caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bitmill.errors import UsageError
from bitmill.native import is_available, native, threads

MAX_TURNS = 1000
MAX_COPIES = 1024  # of matrices of a few kB, which then stay in a cache
_DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not report its caches


class ReadBandwidth:
    """Measures the read bandwidth of the memory, over a buffer larger than all caches, with all threads."""

    def __init__(self) -> None:
        self.buffer = torch.ones(cold_bytes() // 8, dtype=torch.int64)

    def measure(self) -> float:
        """Return the bytes per second of one pass."""
        return self.buffer.nbytes / timed(self._read)

    def _read(self) -> None:
        if is_available():
            native().read_all(self.buffer.view(torch.uint8), threads())
        else:
            self.buffer.sum()


def cache_bytes() -> int:
    """Return the size of the largest cache of the first core."""
    sizes = [_DEFAULT_CACHE_BYTES]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1))
    return max(sizes)


def cold_bytes() -> int:
    """Return the bytes to read in turns so that none of them is in a cache when its turn repeats."""
    return max(4 * cache_bytes(), 128 << 20)


def copies_of(size_bytes: int) -> int:
    """Return the number of copies of a tensor to use in turns, more than caches hold, from 2 to MAX_COPIES."""
    return min(MAX_COPIES, max(2, -(-cold_bytes() // max(1, size_bytes))))


def check_turns(turns: int) -> None:
    """Raise UsageError unless there are 1 to MAX_TURNS turns."""
    if not 1 <= turns <= MAX_TURNS:
        raise UsageError(f"--turns is {turns}; use 1 to {MAX_TURNS}.")


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def linear_time(weights: list[Tensor], x: Tensor) -> float:
    """Time a torch linear layer.

    Args:
        weights: copies of its weight (out, in), used in turns.
        x: input (tokens, in).

    Returns:
        Seconds per layer.
    """
    return timed(lambda: [torch.nn.functional.linear(x, W) for W in weights]) / len(weights)
