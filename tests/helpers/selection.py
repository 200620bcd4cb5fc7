"""Choice of test cases: all of them in `make test-all`, a representative part in `make test`."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Case = TypeVar("Case")

FULL = os.environ.get("BITMILL_FULL_TESTS") == "1"


def thin(cases: Iterable[Case], brief: Iterable[Case] | Callable[[Case], bool]) -> list[Case]:
    """Return all cases in a full run, and otherwise those of `brief`.

    Args:
        cases: every case.
        brief: the cases of a brief run, or a function that returns True for these.
    """
    if FULL:
        return list(cases)
    return [case for case in cases if brief(case)] if callable(brief) else list(brief)


def one_of_each(cases: Iterable[Case], kind: Callable[[Case], Hashable]) -> list[Case]:
    """Return all cases in a full run, and otherwise the first case of each kind."""
    first: dict[Hashable, Case] = {}
    cases = list(cases)
    for case in cases:
        first.setdefault(kind(case), case)
    return thin(cases, first.values())
