"""The output of a command: its result alone on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from bitmill.cli.verbosity import is_quiet
from bitmill.progress import Progress
from bitmill.progress.terminal import TerminalProgress
from bitmill.report.escape import printable, terminal_text

if TYPE_CHECKING:
    from rich.console import RenderableType


E = TypeVar("E", bound=BaseException)
_RESULT = "_result"  # attribute of an error: what the command had found before it


class Interrupted(Exception):
    """Ctrl-C, with a hint how to continue."""


class Output:
    """The result and the progress of one command; `hint` is the message after Ctrl-C."""

    def __init__(self, as_json: bool, stdout: TextIO, progress: Progress, hint: str) -> None:
        self.as_json, self.stdout, self.progress = as_json, stdout, progress
        self.hint = hint
        self.data: dict[str, Any] | None = None

    def result(self, data: dict[str, Any], render: Callable[[], list[RenderableType]]) -> None:
        """Print the result.

        Args:
            data: printed as one JSON object with --json, when the command has ended.
            render: returns the parts printed without --json.
        """
        self.progress.finish()
        if self.as_json:
            self.data = data
            return
        from rich.console import Console

        # a file or a pipe has no width: do not wrap lines for it
        console = Console(file=self.stdout, highlight=False, width=None if self.stdout.isatty() else 400)
        for part in render():
            console.print(terminal_text(part) if isinstance(part, str) else part, crop=False)

    def write(self, text: str) -> None:
        """Write text to stdout at once."""
        self.stdout.write(text)
        self.stdout.flush()

    def note(self, text: str) -> None:
        """Print a line on stderr, unless the command is quiet."""
        if not is_quiet():
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def command_output(as_json: bool, hint: str = "interrupted") -> Iterator[Output]:
    """Redirect stdout to stderr while a command runs, so that libraries cannot print into its result.

    Args:
        as_json: print the result as JSON.
        hint: message after Ctrl-C.
    """
    progress = Progress() if is_quiet() else TerminalProgress()
    stdout = sys.stdout
    output = Output(as_json, stdout, progress, hint)
    elsewhere = io.StringIO() if is_quiet() else sys.stderr
    try:
        with contextlib.redirect_stdout(elsewhere):
            yield output
        if output.data is not None:
            print(json.dumps(to_json_types(output.data), allow_nan=False), file=stdout, flush=True)
    except KeyboardInterrupt:
        raise _with_result(Interrupted(output.hint), output.data) from None
    except Exception as error:
        _with_result(error, output.data)
        raise
    finally:
        progress.finish()


def _with_result(error: E, data: dict[str, Any] | None) -> E:
    error.__dict__[_RESULT] = data
    return error


def partial_result(error: BaseException) -> dict[str, Any]:
    """Return the result of a command that failed after it had one; empty for the others."""
    return getattr(error, _RESULT, None) or {}


def to_json_types(value: Any) -> Any:
    """Return the data in types that JSON has; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_json_types(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def one_line(text: str, limit: int = 300) -> str:
    """Return the text without line breaks, truncated to `limit` characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def property_table(rows: list[tuple[str, str]]) -> RenderableType:
    """Return a table of names and values."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(terminal_text(name), terminal_text(value))
    return table


def data_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> RenderableType:
    """Return a table of plain text with one header row.

    Args:
        columns: headers.
        rows: one text per column.
        left: headers of left-aligned columns; the others are right-aligned.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(terminal_text, row))
    return table


def kv_cache_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) rows about the packed cache of a result that has `kv_method`."""
    from bitmill.report.describe import describe_cache_bits, describe_options

    options = describe_options(result["kv_options"])
    size = f"{result['kv_bytes']:,} bytes, {describe_cache_bits(result['kv_bits_per_element'])}"
    if result["kv_table_bytes"]:
        size += f", and {result['kv_table_bytes']:,} bytes of calibrated tables"
    return [("keys and values", f"{result['kv_method']} ({options})"), ("their cache", size)]
