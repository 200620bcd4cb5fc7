"""The default method: the leader of the measured table at the requested bits.

`leaderboard.json` holds the rows of docs/leaderboard.md: every method on one model, one text, one set of windows
and one machine. `benchmarks/leaderboard.py` writes both.
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
    """One measured recipe.

    Attributes:
        bits: bits of the method's option.
        minutes: time to quantize the table's model on its machine.
    """

    method: str
    bits: int
    bits_per_weight: float
    perplexity: float
    kl_divergence: float
    minutes: float


@cache
def rows() -> tuple[Row, ...]:
    """Return every measured recipe that is a named method with default options."""
    text = files("bitmill.recipes").joinpath("leaderboard.json").read_text(encoding="utf-8")
    return tuple(Row(**row) for row in json.loads(text)["rows"])


def leader(
    bits: int, within_minutes: float = WITHIN_MINUTES, suits: Callable[[str], bool] = lambda method: True
) -> Row | None:
    """Return the row of least KL divergence, or None.

    Args:
        bits: bits of the option; rows count that store up to half a bit more per weight.
        within_minutes: the longest time to quantize.
        suits: predicate of method names; only methods for which it is true count.

    Returns:
        None where no row fits, and where only one method was measured at these bits.
    """
    fit = [r for r in rows() if r.bits == bits and r.minutes <= within_minutes and r.bits_per_weight <= bits + 0.5]
    fit = [r for r in fit if suits(r.method)]
    if len({r.method for r in rows() if r.bits == bits}) < 2:
        return None
    return min(fit, key=lambda r: (r.kl_divergence, r.bits_per_weight), default=None)


def leading_recipe(
    options: dict[str, Any] | None = None, within_minutes: float = WITHIN_MINUTES
) -> tuple[Recipe, str]:
    """Return the default recipe and one sentence that explains the choice.

    Args:
        options: options of the method, see `build_recipe`; `bits` defaults to DEFAULT_BITS. Only methods that
        have all of
            these options count.
        within_minutes: the longest time to quantize.

    Raises:
        RecipeError: no method has these options.
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
