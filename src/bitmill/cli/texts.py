"""bitmill texts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.complete import complete_text
from bitmill.cli.options import AsJson
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.config.texts import MIX

TextName = Annotated[
    str | None,
    typer.Argument(
        help="Download the packages of one text, or of mix or suite, and show its parts.",
        autocompletion=complete_text,
        show_default=False,
    ),
]
COLUMNS = ("name", "mix", "description", "licence", "origin")


def texts(name: TextName = None, as_json: AsJson = False) -> None:
    """List the texts to calibrate and to measure on, or download one and show its parts."""
    with command_output(as_json) as output:
        from bitmill.data.domain import DOMAINS, SUITE
        from bitmill.data.mixture import shares

        if name is not None:
            parts = _parts(name)
            output.result({"name": name, "parts": parts}, lambda: [property_table(_rows(parts))])
            return
        weights = shares(MIX, "calib")
        whole = sum(weights.values())
        found = [
            {
                "name": key,
                "share_of_mix": weights.get(key, 0) / whole,
                "in_suite": key in SUITE,
                **{field: getattr(domain, field) for field in ("description", "licence", "origin")},
            }
            for key, domain in DOMAINS.items()
        ]
        rows = [[_cell(row, column) for column in COLUMNS] for row in found]
        output.result(
            {"texts": found, "mix": weights, "suite": list(SUITE)},
            lambda: [
                data_table(COLUMNS, rows, left=COLUMNS),
                "",
                f"mix calibrates on these shares and measures on suite: {', '.join(SUITE)}.",
                "pydoc, a .txt or .jsonl file and hf:dataset need none of these downloads.",
            ],
        )


def _cell(row: dict[str, Any], column: str) -> str:
    if column != "mix":
        return str(row[column])
    return f"{row['share_of_mix']:.0%}" if row["share_of_mix"] else "-"


def _parts(name: str) -> dict[str, dict[str, int]]:
    """Return the number of documents and characters of every part of a text that has documents.

    Raises:
        UsageError: There is no such text.
        SourceError: Its package cannot be downloaded.
    """
    from bitmill.data.domain import DOMAINS, PARTS
    from bitmill.data.mixture import MIXTURES, is_domain, mixture_documents
    from bitmill.errors import CalibrationError, UsageError

    if not is_domain(name):
        known = ", ".join((*MIXTURES, *DOMAINS.names()))
        raise UsageError(f"There is no text {name!r}; choose one of: {known}.")
    parts = {}
    for part in PARTS:
        try:
            documents = mixture_documents(name, part)
        except CalibrationError:  # only for measuring
            documents = []
        parts[part] = {"documents": len(documents), "characters": sum(map(len, documents))}
    return parts


def _rows(parts: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    return [
        (part, f"{found['documents']:,} documents, {found['characters']:,} characters")
        for part, found in parts.items()
    ]
