"""Failures of a command: one sentence on stderr and, with --json, one JSON object on stdout."""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import typer

from bitmill.cli.output import Interrupted, one_line, partial_result, to_json_types
from bitmill.errors import BitmillError, is_out_of_memory

USAGE = 2
UNEXPECTED = 70  # EX_SOFTWARE
INTERRUPTED = 130
_MAX_CHARACTERS = 2000  # of a sentence
_NO_MEMORY = "The memory of this machine does not suffice; use a smaller model, shorter windows or fewer bits."


@dataclass(frozen=True)
class Failure:
    """The end of a command that failed.

    Attributes:
        type: name of the error's class.
        message: one sentence: what is wrong, with which value, and how to fix it.
        exit_code: exit status of the process.
    """

    type: str
    message: str
    exit_code: int


def wants_json(args: list[str]) -> bool:
    """Return True if the words of a command line, which may not be valid, hold --json."""
    return "--json" in itertools.takewhile(lambda word: word != "--", args)


def report_failure(error: BaseException, args: list[str]) -> int:
    """Print the failure of a command, and return its exit status.

    Args:
        error: what the command raised.
        args: words of the command line.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
        return USAGE
    failure = describe_failure(error, args)
    if failure.exit_code == UNEXPECTED and debugging():
        traceback.print_exception(error)
    prefix = "" if failure.exit_code == INTERRUPTED else "error: "
    print(f"{prefix}{failure.message}", file=sys.stderr)
    if wants_json(args):
        data = {**to_json_types(partial_result(error)), "error": asdict(failure)}
        print(json.dumps(data, allow_nan=False), flush=True)
    return failure.exit_code


def describe_failure(error: BaseException, args: list[str]) -> Failure:
    """Return the failure of a command for what it raised."""
    name = type(error).__name__
    if isinstance(error, Interrupted):
        return Failure(name, str(error), INTERRUPTED)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Failure(Interrupted.__name__, "interrupted", INTERRUPTED)
    if isinstance(error, BitmillError):
        return Failure(name, one_line(str(error), _MAX_CHARACTERS), error.exit_code)
    if isinstance(error, OSError):
        return Failure(name, one_line(_describe_os_error(error), _MAX_CHARACTERS), BitmillError.exit_code)
    # typer contains its own click since 0.29, so its errors are recognized by their attributes
    if hasattr(error, "format_message"):
        message = f"{error.format_message().rstrip('.')}{_given_value(error, args)}; see bitmill --help."
        return Failure("UsageError", one_line(message, _MAX_CHARACTERS), USAGE)
    if is_out_of_memory(error):
        return Failure("MemoryError", _NO_MEMORY, BitmillError.exit_code)
    return Failure(name, one_line(_describe_unexpected(error), _MAX_CHARACTERS), UNEXPECTED)


def debugging() -> bool:
    """Return True if BITMILL_DEBUG asks for tracebacks and the warnings of libraries."""
    return os.environ.get("BITMILL_DEBUG", "") not in ("", "0")


def _given_value(error: Any, args: list[str]) -> str:
    """Return the value given for the option that an error is about, which its message may leave out."""
    names = getattr(getattr(error, "param", None), "opts", [])
    found = ""
    for name, value in itertools.pairwise([*args, ""]):  # the last one counts
        if name.partition("=")[0] in names:
            found = f" (found {value if name in names else name.partition('=')[2]!r})"
    return found


def _describe_os_error(error: OSError) -> str:
    """Return one sentence about a file or device that failed where no sentence of its own was foreseen."""
    reason = error.strerror or one_line(str(error)) or type(error).__name__
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{reason}; check the path, its permissions and the disk."


def _describe_unexpected(error: BaseException) -> str:
    message = one_line(str(error))
    kind = f"{type(error).__name__} ({message})" if message else type(error).__name__
    return f"Unexpected {kind}: run with BITMILL_DEBUG=1 for the traceback; please report."
