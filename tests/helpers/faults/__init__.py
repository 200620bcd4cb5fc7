"""Faults by subject.

A fault damages a copy of the workspace and returns the command to run and the words its error must contain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Fault = Callable[..., tuple[list[str], list[object]]]


class Faults(dict[str, Fault]):
    """Faults by name. Applied to a function it files it: disk_full becomes "disk full"."""

    def __call__(self, function: Fault) -> Fault:
        self[function.__name__.replace("_", " ")] = function
        return function


def change_json(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))
