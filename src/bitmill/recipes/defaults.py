"""Which method to take when none is named: the one that leads the measured table at these bits.

`leaderboard.json` holds the rows of docs/leaderboard.md: every method on one model, same text, same
windows, one machine. `benchmarks/leaderboard.py` writes both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bitmill.errors import RecipeError

if TYPE_CHECKING:
    from bitmill.recipes.recipe import Recipe

WITHIN_MINUTES = 15.0
DEFAULT_BITS = 3
FALLBACKS = ("gptqt", "gptq")  # where nothing leads: the first that has these bits


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
    text = files("bitmill.recipes").joinpath("leaderboard.json").read_text(encoding="utf-8")
    return tuple(Row(**row) for row in json.loads(text)["rows"])


def leader(
    bits: int, within_minutes: float = WITHIN_MINUTES, suits: Callable[[str], bool] = lambda method: True
) -> Row | None:
    """The row of least KL divergence at `bits` among those that took at most `within_minutes`; None without one.

    A method may store more than `bits`: rows count up to half a bit above. One method alone leads nothing.
    suits: says of a method whether it may lead.
    """
    fit = [r for r in rows() if r.bits == bits and r.minutes <= within_minutes and r.bits_per_weight <= bits + 0.5]
    fit = [r for r in fit if suits(r.method)]
    if len({r.method for r in rows() if r.bits == bits}) < 2:
        return None
    return min(fit, key=lambda r: (r.kl_divergence, r.bits_per_weight), default=None)


def leading_recipe(
    options: dict[str, Any] | None = None, within_minutes: float = WITHIN_MINUTES
) -> tuple[Recipe, str]:
    """What is used when no method is named, and why: the leader at `options["bits"]`, or at DEFAULT_BITS.

    options: of that method, as for `build_recipe`. It leads among the methods that have them all; where none has,
    RecipeError is raised.
    """
    from bitmill.recipes.method import METHODS, build_recipe

    given = {"bits": DEFAULT_BITS, **(options or {})}
    bits = int(given["bits"]) if str(given["bits"]).isdecimal() else DEFAULT_BITS  # the method refuses the rest
    asked = sorted(given.keys() - {"bits"})

    def suits(method: str) -> bool:
        return set(asked) <= set(METHODS.get(method).__dataclass_fields__)

    row = leader(bits, within_minutes, suits)
    if row is None:
        method = next((name for name in FALLBACKS if _has(name, bits)), FALLBACKS[0])
        reason = (
            f"no method was named, and the leaderboard has nothing at {bits} bits within {within_minutes:g} "
            f"minutes{_among(asked)}: {method}"
        )
    else:
        method = row.method
        reason = (
            f"no method was named: {method} leads the leaderboard at {bits} bits (KL {row.kl_divergence:.3f} at "
            f"{row.bits_per_weight:.2f} bits per weight, {row.minutes:.0f} minutes) "
            f"within {within_minutes:g} minutes, on the float model's statistics{_among(asked)}"
        )
    if "bits" not in METHODS.get(method).__dataclass_fields__:
        del given["bits"]  # it has no others
    return build_recipe(method, given), reason


def _among(options: list[str]) -> str:
    return f", among methods with {' and '.join(options)}" if options else ""


def _has(method: str, bits: int) -> bool:
    from bitmill.recipes.method import build_recipe

    try:
        return bool(build_recipe(method, {"bits": bits}))
    except RecipeError:
        return False
