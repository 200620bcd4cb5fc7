"""One engine in a process of its own: it loads a model, then answers requests, a JSON object a line.

`Engine` is the interface; a file peer_*.py defines one and ends with `serve`. This file runs in the environments
of all peers, so it imports only numpy and the standard library.

Requests name a method of the engine in "do": settings, check, decode, prefill, and others that it defines.
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
    """A loaded model that reads tokens and returns logits."""

    def __init__(self, model: Path, threads: int, context: int, option: str) -> None:
        raise NotImplementedError

    def read(self, tokens: list[int]) -> np.ndarray:
        """Reset the cache and read a prompt; returns logits (vocabulary,) after its last token."""
        raise NotImplementedError

    def step(self, token: int) -> np.ndarray:
        """Read one more token; returns logits (vocabulary,)."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings of the engine as plain data."""
        return {}

    def tune(self, prompt: list[int], tokens: int) -> None:
        """Run everything that is measured once; engines with settings find the fastest ones.

        Args:
            prompt: Token ids.
            tokens: Number of tokens to decode.
        """
        self.decode(prompt[:16], 2)
        self.prefill(prompt)

    # -- Measurements; an engine without `step` overrides them ---------------------------------------------

    def check(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return a greedy continuation and its first logits.

        Args:
            prompt: Token ids.
            tokens: Number of tokens to decode.
        """
        logits = self.read(prompt)
        first, decoded, finite = logits.tolist(), [], True  # before the engine writes over them
        for _ in range(tokens):
            finite &= bool(np.isfinite(logits).all())
            decoded.append(int(logits.argmax()))
            logits = self.step(decoded[-1])
        return {"tokens": decoded, "finite": finite, "vocabulary": len(first), "logits": first}

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Return seconds per token, the median over greedy tokens.

        Args:
            prompt: Token ids.
            tokens: Number of tokens to decode.
        """
        logits, times = self.read(prompt), []
        for _ in range(tokens):
            started = time.perf_counter()
            logits = self.step(int(logits.argmax()))
            times.append(time.perf_counter() - started)
        return median(times)

    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds to the logits after a prompt."""
        started = time.perf_counter()
        self.read(prompt)
        return time.perf_counter() - started


def serve(kind: type[Engine]) -> None:
    """Answer requests until stdin ends; stdout carries only answers, prints of libraries go to stderr."""
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
