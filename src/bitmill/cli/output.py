"""What a command prints: its result alone on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from bitmill.cli.progress import TerminalProgress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bitmill.report.metrics import MetricColumn


class Interrupted(Exception):
    """Ctrl-C, with what to do next."""


class Output:
    """Where the result of one command goes."""

    def __init__(self, as_json: bool, stdout: TextIO, progress: TerminalProgress) -> None:
        self.as_json, self.stdout, self.progress = as_json, stdout, progress

    def result(self, data: dict[str, Any], readable: Callable[[], list[RenderableType]]) -> None:
        """Print `data` as one JSON object, or the readable form of it."""
        self.progress.finish()
        if self.as_json:
            print(json.dumps(plain(data), allow_nan=False), file=self.stdout, flush=True)
            return
        from rich.console import Console

        # a file or a pipe has no width: lines are not broken for it
        console = Console(file=self.stdout, highlight=False, width=None if self.stdout.isatty() else 400)
        for part in readable():
            console.print(part, crop=False)


@contextlib.contextmanager
def working(as_json: bool, hint: str = "interrupted") -> Iterator[Output]:
    """While a command works, whatever libraries print goes to stderr.

    hint: what to say when the user stops it.
    """
    progress = TerminalProgress()
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield Output(as_json, stdout, progress)
    except KeyboardInterrupt:
        raise Interrupted(hint) from None
    finally:
        progress.finish()


def plain(value: Any) -> Any:
    """The same data in types JSON has; NaN and the infinities, which it has not, become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def in_one_line(text: str, limit: int = 300) -> str:
    """The text without line breaks and of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def facts(rows: list[tuple[str, str]], title: str = "") -> RenderableType:
    """A small table of names and values."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else f"{value:,}"


def megabytes(size_bytes: int) -> str:
    """A size for people, in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.1f} MB"


def kv_facts(kv: dict[str, Any]) -> str:
    """How keys and values are kept, in a line."""
    from bitmill.report.describe import describe_options

    options = dict(kv["method"])
    name = options.pop("kv method")
    size = f", {kv['size_bytes']:,} bytes of calibration" if kv["size_bytes"] else ""
    return (
        f"{name} ({describe_options(options)}): {kv['bits_per_element']:.3f} bits per number in full pages{size}"
    )


def kv_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The packed cache of a result that has kv_method, kv_options and the figures beside them."""
    from bitmill.report.describe import describe_options

    options = describe_options(result["kv_options"])
    taken = f"{result['kv_bits_per_element']:.3f} bits per number, {megabytes(result['kv_bytes'])}"
    if result["kv_table_bytes"]:
        taken += f", and {result['kv_table_bytes']:,} bytes of calibrated tables"
    return [("keys and values", f"{result['kv_method']} ({options})"), ("their cache", taken)]


def figure_value(figure: MetricColumn, measured: dict[str, Any]) -> str:
    """One figure of a measurement, with its unit; a dash where it is missing."""
    value = measured.get(figure.key)
    if value is None:
        return "-"
    return f"{value:.2%}" if figure.share else f"{number(value, 5)} {figure.unit}".rstrip()


def measured_row(measured: dict[str, Any]) -> str:
    """One measurement in a line."""
    from bitmill.report.describe import describe_measured_cache
    from bitmill.report.metrics import metric_columns

    known = [figure for figure in metric_columns([measured]) if measured.get(figure.key) is not None]
    parts = [f"{figure.name} {figure_value(figure, measured)}" for figure in known]
    where = f"{measured.get('windows')} x {measured.get('seqlen')} tokens of {measured.get('text')}"
    cache = describe_measured_cache(measured)
    return f"{', '.join(parts)}{cache} ({where}, {measured.get('split')} split)"
