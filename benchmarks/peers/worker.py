"""One engine in a process of its own: it loads a model, then answers requests, a JSON object a line.

Everything an engine needs to say is `Engine`; a file peer_*.py holds one and ends with `serve`. This file runs in
the environments of all peers, so it imports numpy and Python's own library alone.

Requests, by "do": settings, check, decode, prefill, bandwidth (where the engine can), and whatever else it names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


class Engine:
    """A loaded model that reads tokens and says what comes next."""

    def __init__(self, model: Path, threads: int, context: int, option: str) -> None:
        raise NotImplementedError

    def read(self, tokens: list[int]) -> np.ndarray:
        """Forget everything, read a prompt; logits (vocabulary,) after its last token."""
        raise NotImplementedError

    def step(self, token: int) -> np.ndarray:
        """Read one token more; logits (vocabulary,)."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What the engine runs with, as plain data."""
        return {}

    def tune(self, prompt: list[int], tokens: int) -> None:
        """Run once what will be measured; find the fastest settings, where the engine has a choice of them."""
        self.decode(prompt[:16], 2)
        self.prefill(prompt)

    # -- what is measured; an engine that has no `step` says these itself ----------------------------------

    def check(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Greedy continuation, and the logits it began with."""
        logits = self.read(prompt)
        first, said, finite = logits.tolist(), [], True  # before the engine writes over them
        for _ in range(tokens):
            finite &= bool(np.isfinite(logits).all())
            said.append(int(logits.argmax()))
            logits = self.step(said[-1])
        return {"tokens": said, "finite": finite, "vocabulary": len(first), "logits": first}

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Seconds a token, the median over greedy tokens."""
        logits, times = self.read(prompt), []
        for _ in range(tokens):
            started = time.perf_counter()
            logits = self.step(int(logits.argmax()))
            times.append(time.perf_counter() - started)
        return median(times)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the logits after a prompt are there."""
        started = time.perf_counter()
        self.read(prompt)
        return time.perf_counter() - started


def serve(kind: type[Engine]) -> None:
    """Answer requests until there are none; only answers go to stdout, whatever libraries print to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--option", default="")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    engine = kind(arguments.model, arguments.threads, arguments.context, arguments.option)
    _say(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        verb: Callable[..., Any] = getattr(engine, request.pop("do"))
        _say(answers, verb(**request))


def _say(answers: Any, answer: Any) -> None:
    print(json.dumps(answer), file=answers, flush=True)
