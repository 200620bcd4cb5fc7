"""The budget as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from bitmill.errors import UsageError, quoted

_FORM = re.compile(
    r"(\d+(?:\.\d+)?)\s*(bpw|[kmg]i?b)(?:\s+at\s+(\d+(?:\.\d+)?)([km]?)\s+(?:tokens?|context))?",
    re.ASCII | re.IGNORECASE,
)
_POWERS = {"k": 1, "m": 2, "g": 3}
_TOKENS = {"": 0, "k": 1, "m": 2}
MAX_BITS_PER_WEIGHT = 64


@dataclass(frozen=True)
class Budget:
    """The most that a quantized model may take.

    Attributes:
        text: as the user wrote it.
        bits_per_weight: of the linears of the blocks, all metadata included; None for a budget of files.
        size_bytes: of all files of weights, embedding and head included; with a context of the process that runs
            the model; None for a budget of the blocks.
        context: tokens at which the process has that memory; None for other budgets.
    """

    text: str
    bits_per_weight: Fraction | None = None
    size_bytes: int | None = None
    context: int | None = None

    @property
    def counts_files(self) -> bool:
        """True where embedding, head and all that stays in float count too."""
        return self.size_bytes is not None


def parse_budget(text: str) -> Budget:
    """Parse a budget: `3.0bpw`, `70MB` (70 * 10^6 bytes), `70MiB` (70 * 2^20), or `8GB at 32k context`.

    Raises:
        UsageError: the text has another form.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UsageError(
            f"The budget is {quoted(text)}; write bits per weight of the blocks, such as 3.0bpw, the size of the "
            "files of weights, such as 70MB or 1.5GB, or the memory of the running model, such as 8GB at 32k "
            "context."
        )
    context = int(float(found[3]) * 1024 ** _TOKENS[found[4].lower()]) if found[3] else None
    if context is not None and not 1 <= context < 1 << 40:
        raise UsageError(f"The budget is {quoted(text)}; give a context of at least one token, such as 32k.")
    number, unit = Fraction(found[1]), found[2].lower()
    if unit == "bpw":
        if context is not None:
            raise UsageError(
                f"The budget is {quoted(text)}; bits per weight have no context: give memory, such as 8GB at 32k "
                "context."
            )
        if number > MAX_BITS_PER_WEIGHT:
            raise UsageError(f"The budget is {quoted(text)}; no format has more than 64 bits per weight.")
        return Budget(f"{found[1]}bpw", bits_per_weight=number)
    base = 1024 if unit[1] == "i" else 1000
    size = int(number * base ** _POWERS[unit[0]])
    if size >= 1 << 60:
        raise UsageError(f"The budget is {quoted(text)}; give a size below 2^60 bytes.")
    at = f" at {found[3]}{found[4]} context" if found[3] else ""
    return Budget(f"{found[1]}{found[2]}{at}", size_bytes=size, context=context)
