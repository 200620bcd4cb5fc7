"""Errors that a user can cause and fix.

Each message is one sentence: what was wrong, with which value, and what to do about it.
The command line prints the sentence and exits with `exit_code`; a traceback means a fault of ours.
"""

from __future__ import annotations

MAX_QUOTED_CHARACTERS = 200


class BitmillError(Exception):
    """Base of every foreseeable failure."""

    exit_code = 1


class UsageError(BitmillError):
    """An argument is out of range or two arguments contradict each other."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe names something unknown, or combines parts that do not fit."""


class SourceError(BitmillError):
    """The model to quantize cannot be opened, read or understood."""


class CalibrationError(BitmillError):
    """The calibration or evaluation text is unusable."""


class CheckpointError(BitmillError):
    """A quantized folder is missing something, was altered, or does not match what is asked of it."""


class OutputError(BitmillError):
    """The result cannot be written where it was asked for."""


class NumericsError(BitmillError):
    """A weight or a statistic is not finite, or a factorization failed for good."""


def one_line(error: BaseException) -> str:
    """Return the message of another library's error on one line, without a final full stop, to be quoted."""
    text = (" ".join(str(error).split()) or type(error).__name__).rstrip(".:")
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS].rstrip() + "..."
