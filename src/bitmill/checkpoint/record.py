"""Add a measurement to a finished folder: to its report, and to the model card and the page made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.checkpoint.files import write_json, write_text
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.errors import CheckpointError
from bitmill.report.figures import EMBEDDING, LANGUAGE
from bitmill.report.html import folder_documents

# Time and memory belong to the machine, not to the model, and are left out.
_KEPT = (
    "text",
    "split",
    "seqlen",
    "windows",
    "tokens",
    "pooling",
    *(figure.key for figure in LANGUAGE + EMBEDDING),
    "reference",
)
_SAME = ("by", "text", "split", "seqlen", "windows", "reference")


def record_measurement(folder: Path, result: dict[str, Any]) -> None:
    """Append what `bitmill.evaluate` returned; a repetition takes the place of the earlier one.

    Raises CheckpointError for a damaged report, OutputError when the folder cannot be written.
    """
    report = open_checkpoint(folder).report
    entry = {"by": "eval", **{key: result[key] for key in _KEPT if result.get(key) is not None}}
    kept = [m for m in report["measured"] if any(m.get(key) != entry.get(key) for key in _SAME)]
    report = {**report, "measured": [*kept, entry]}
    try:
        documents = folder_documents(report)
    except Exception as error:  # the templates meet whatever the report lacks
        raise CheckpointError(f"{folder}/report.json is incomplete ({error}); quantize again.") from None
    write_json(folder / "report.json", report)
    for name, text in documents.items():
        write_text(folder / name, text)
