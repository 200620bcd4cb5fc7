"""Errors that a user can cause and fix.

Each message is one sentence: what is wrong, with which value, and how to fix it. The command line prints the
sentence and exits with `exit_code`; a traceback is a bug.
"""

from __future__ import annotations

MAX_QUOTED_CHARACTERS = 200
MAX_CHARACTERS = 1500  # of a message


class BitmillError(Exception):
    """Base of every foreseeable failure: one line, also where a value that it names is long or has line breaks."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        text = " ".join(message.splitlines())
        if len(text) > MAX_CHARACTERS:
            half = MAX_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


class UsageError(BitmillError):
    """An argument is out of range, or two arguments contradict each other."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe names an unknown part, or combines parts that do not fit together."""


class SourceError(BitmillError):
    """The model cannot be opened, read or interpreted."""


class CalibrationError(BitmillError):
    """The calibration or evaluation text is unusable."""


class CheckpointError(BitmillError):
    """A quantized folder is incomplete, was altered, or does not match the request."""


class OutputError(BitmillError):
    """The result cannot be written to the requested place."""


class NumericsError(BitmillError):
    """A weight or a statistic is not finite, or a factorization failed."""


class NotEnoughMemoryError(BitmillError, MemoryError):
    """More memory is needed than is free."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error of Python or torch, on any device, about memory that is not there."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def quoted(value: object) -> str:
    """Return the repr of a value for a message, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS].rstrip() + "..."


def one_line(error: BaseException) -> str:
    """Return the message of another library's error on one line, without a final full stop, for a quotation."""
    text = (" ".join(str(error).split()) or type(error).__name__).rstrip(".:")
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS].rstrip() + "..."
