"""Which method to take when none is named: the one that leads the measured table at these bits.

`data/leaderboard.json` holds the rows of docs/leaderboard.md: every method on one model, same text, same
windows, one machine. `benchmarks/leaderboard.py` writes both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

WITHIN_MINUTES = 15.0


@dataclass(frozen=True)
class Row:
    """One measured recipe. bits: as asked for.  minutes: to quantize the table's model on its machine."""

    method: str
    bits: int
    bits_per_weight: float
    perplexity: float
    kl_divergence: float
    minutes: float


@cache
def rows() -> tuple[Row, ...]:
    """Every measured recipe that is a named method at its defaults."""
    text = files("bitmill").joinpath("data/leaderboard.json").read_text(encoding="utf-8")
    return tuple(Row(**row) for row in json.loads(text)["rows"])


def leader(bits: int, within_minutes: float = WITHIN_MINUTES) -> Row | None:
    """The row of least KL divergence at `bits` among those that took at most `within_minutes`; None without one.

    A method may store more than `bits`: rows count up to half a bit above.
    """
    fit = [r for r in rows() if r.bits == bits and r.minutes <= within_minutes and r.bits_per_weight <= bits + 0.5]
    return min(fit, key=lambda r: (r.kl_divergence, r.bits_per_weight), default=None)
