"""Comparisons in a test workspace: the command, its results, and cells that run in this process."""

from __future__ import annotations

import io
from pathlib import Path

from bitmill.report.results import read_results
from bitmill.workflows.comparison import process, worker
from bitmill.workflows.comparison.process import VariantFailed

TERMS = ["--samples", "4", "--seqlen", "32", "--windows", "2", "--max-new-tokens", "3"]


def in_this_process(folder: Path, name: str, log: Path, progress) -> dict:
    """Run a cell here: a process of its own spends seconds on imports."""
    stdout = io.StringIO()
    worker.main([str(folder), name], stdout=stdout)
    outcome: dict = {}
    for line in stdout.getvalue().splitlines():
        outcome |= process.handle_message(line, progress, name)
    if "result" not in outcome:
        raise VariantFailed(outcome["failed"])
    return outcome["result"]


def command(workspace, *more: object, methods: str = "rtn,gptq", bits: str = "3,4") -> list[str]:
    grid = ["--methods", methods, "--bits", bits] if methods else []
    return ["compare", "source", *grid, "--calib", workspace.text.name, *TERMS, "-o", "grid", *map(str, more)]


def results(workspace):
    return read_results(workspace.root / "grid" / "results.json")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
