"""Run the README's first three commands in an empty folder, and record what they print.

    python benchmarks/tour.py

Writes docs/tour.md, the whole output with the seconds until each first line and until the end, and the excerpt of
the README. Let the machine do nothing else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bitmill.workflows.machine import describe_machine

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "tour.md", ROOT / "README.md"
FOLDER = "smollm2-3bit"
COMMANDS = (
    f"bitmill quantize smollm2-135m --bits 3 --samples 16 -o {FOLDER}",
    f"bitmill eval {FOLDER} --reference smollm2-135m --text suite --windows 6 --record",
    f'bitmill generate {FOLDER} --prompt "What is the capital of France?"',
)
EXCERPT = re.compile(r"(method|bits per weight|size) {2,}.*[(,]|(domain|mean) {2,}|The capital")
COLUMNS = 110


@dataclass(frozen=True)
class Shown:
    """One command on the screen: its output, and the seconds until its first line and until its end."""

    command: str
    output: str
    first: float
    total: float


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shown = [run(command, Path(folder)) for command in COMMANDS]
    PAGE.write_text(page(shown), encoding="utf-8")
    README.write_text(with_excerpt(README.read_text(encoding="utf-8"), shown), encoding="utf-8")


def run(command: str, folder: Path) -> Shown:
    """Run a command in a folder; progress goes to the error stream, as it does where a screen is no terminal."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": str(COLUMNS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines, first = [], 0.0
    for line in process.stdout:
        first = first or time.perf_counter() - began
        lines.append(line.rstrip())
    if process.wait():
        raise SystemExit("\n".join([f"{command} ended with {process.returncode}:", *lines]))
    return Shown(command, "\n".join(lines), first, time.perf_counter() - began)


def page(shown: list[Shown]) -> str:
    """Return docs/tour.md."""
    machine = describe_machine("cpu")
    total = sum(each.total for each in shown)
    lines = [
        "# Three commands, as they look",
        "",
        f"Recorded by `benchmarks/tour.py` on {machine['cpu']}, {machine['cores']} cores, where model and texts "
        f"had been downloaded: {total:.0f} s in all. In a terminal, one line that moves shows the progress.",
    ]
    for each in shown:
        lines += ["", "```console", f"$ {each.command}", each.output, "```", ""]
        lines += [f"The first line came after {each.first:.1f} s, the end after {each.total:.0f} s."]
    return "\n".join([*lines, ""])


def with_excerpt(readme: str, shown: list[Shown]) -> str:
    """Return the README with the commands and the lines of their output that matter most."""
    total = sum(each.total for each in shown) / 60
    lines = ["```sh", *COMMANDS, "```", "", f"They take {total:.1f} minutes on 2 cores, and print, among more:"]
    lines += ["", "```text"]
    for each in shown:
        lines += [line.strip() for line in each.output.splitlines() if EXCERPT.match(line)]
        lines += [""] if each is not shown[-1] else []
    text = "\n".join([*lines, "```"])
    begin, end = "<!-- tour:begin -->\n", "\n<!-- tour:end -->"
    return re.sub(rf"{begin}.*?{end}", lambda _: begin + text + end, readme, flags=re.DOTALL)


if __name__ == "__main__":
    main()
