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
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)\s+prompts?\s+of\s+(\d+)(?:\s+tokens?)?", re.ASCII | re.IGNORECASE)
_SPEED = re.compile(r"(\d+(?:\.\d+)?)\s*tokens?\s*(?:/\s*s|(?:a|per)\s+second)", re.ASCII | re.IGNORECASE)
_MAX_TOKENS, _MAX_SECONDS = 1 << 16, 3600  # of a prompt whose layers are timed
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
        seconds: time of the linear layers of the blocks for `tokens` tokens at once; None for other budgets.
        tokens: of a prompt; 1 for a budget of tokens a second.
    """

    text: str
    bits_per_weight: Fraction | None = None
    size_bytes: int | None = None
    context: int | None = None
    seconds: Fraction | None = None
    tokens: int = 1

    @property
    def counts_files(self) -> bool:
        """True where embedding, head and all that stays in float count too."""
        return self.size_bytes is not None


def parse_budget(text: str) -> Budget:
    """Parse a budget: `3.0bpw`, `70MB` (70 * 10^6 bytes), `70MiB` (70 * 2^20), `8GB at 32k context`,
    `40ms prompts of 512`, or `25 tokens/s`.

    Raises:
        UsageError: the text has another form.
    """
    if (latency := _parse_latency(text)) is not None:
        return latency
    found = _FORM.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UsageError(
            f"The budget is {quoted(text)}; write bits per weight of the blocks, such as 3.0bpw, the size of the "
            "files of weights, such as 70MB or 1.5GB, the memory of the running model, such as 8GB at 32k "
            "context, or the time of its linear layers, such as 40ms prompts of 512 or 25 tokens/s."
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


def _parse_latency(text: str) -> Budget | None:
    """Return a budget of time; None for text of another form."""
    if found := _SPEED.fullmatch(text.strip()):
        tokens, seconds, written = 1, Fraction(found[1]), f"{found[1]} tokens/s"
        seconds = 1 / seconds if seconds else seconds
    elif found := _LATENCY.fullmatch(text.strip()):
        unit = found[2].lower()
        tokens, seconds = int(found[3]), Fraction(found[1]) / (1000 if unit == "ms" else 1)
        written = f"{found[1]}{unit} prompts of {tokens}"
    else:
        return None
    if not 0 < seconds <= _MAX_SECONDS or not 1 <= tokens <= _MAX_TOKENS:
        raise UsageError(
            f"The budget is {quoted(text)}; give a time above 0 of at most an hour, and prompts of 1 to "
            f"{_MAX_TOKENS:,} tokens."
        )
    return Budget(written, seconds=seconds, tokens=tokens)
