"""The request of quantize.py to the script of a program, whose environment lacks bitmill, and the answer."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

STARTED = time.monotonic()


class Request(argparse.Namespace):
    """A model, its calibration windows, and the settings.

    Attributes:
        model: Folder of the float model.
        tokens: .npy file of token ids (windows, tokens).
        out: Folder to write, which exists.
        setting: Bits of a weight, or a type of weights.
        group: Weights that share a scale.
        iters: Iterations of a program that trains.
    """

    model: str
    tokens: Path
    out: Path
    setting: str
    group: int
    iters: int

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return int(self.setting)

    def windows(self) -> np.ndarray:
        """Return token ids (windows, tokens)."""
        return np.load(self.tokens).astype(np.int64)


def request() -> Request:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("setting")
    for name in ("group", "iters"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(namespace=Request())


def report(asked: Request, version: str, settings: str) -> None:
    """Write version, settings and cost of the program, whose process this is, with loading and saving.

    Args:
        asked: The request.
        version: Of the program.
        settings: In words.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    about = {
        "version": version,
        "settings": settings,
        "seconds": time.monotonic() - STARTED,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": used.ru_maxrss * 1024,
    }
    (asked.out / "about.json").write_text(json.dumps(about), encoding="utf-8")
