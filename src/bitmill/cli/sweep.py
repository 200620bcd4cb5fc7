"""bitmill sweep."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, Device, Model, TrustRemoteCode
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.errors import UsageError
from bitmill.report.text import format_mb, format_number

_WORST_LAYERS = 5  # listed

Text = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Also measure on this text: pydoc, a name of bitmill texts, a .txt or .jsonl file, hf:dataset.",
        show_default=False,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(metavar="W", help="With --text: number of windows; 4 when left out.", show_default=False),
]
Seqlen = Annotated[
    int | None,
    typer.Option(metavar="L", help="With --text: tokens per window; 512 when left out.", show_default=False),
]
Search = Annotated[bool, typer.Option("--search", help="Shrink each range to the least squared weight error.")]


def sweep(
    model: Model,
    text: Text = None,
    windows: Windows = None,
    seqlen: Seqlen = None,
    search: Search = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Round every layer at many bits and group sizes, and report which a model tolerates, without calibration."""
    if text is None and (windows is not None or seqlen is not None):
        raise UsageError("--windows and --seqlen divide a text; name it with --text.")
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.sweep import sweep

        result = sweep(
            model,
            text=text,
            windows=4 if windows is None else windows,
            seqlen=512 if seqlen is None else seqlen,
            search=search,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=output.progress,
        )
        output.result(result, lambda: _render(result))


def _render(result: dict[str, Any]) -> list[Any]:
    measured = result["measured"]
    rows = [
        ("model", str(result["model"])),
        ("layers", f"{len(result['layers'])} ({result['quantized_weights']:,} weights)"),
        ("ranges", "shrunk to the least error" if result["search"] else "from the smallest to the largest weight"),
    ]
    if measured:
        windows = f"{measured['windows']} x {measured['seqlen']} tokens of {measured['text']}"
        reference = format_number(measured["reference_perplexity"])
        rows.append(("text", f"{windows}, {measured['split']} split; perplexity of the float model {reference}"))
    worst = [
        f"{layer['name']} ({layer['relative_error']:.2f} x the mean)" for layer in result["layers"][:_WORST_LAYERS]
    ]
    kinds = [f"{kind['name']} {kind['relative_error']:.2f}" for kind in result["kinds"]]
    totals = [
        ("largest errors", ", ".join(worst)),
        ("by kind", ", ".join(kinds) + " x the mean"),
        ("time", f"{format_number(result['time_s'])} s"),
        ("peak memory", format_mb(result["peak_memory_bytes"])),
    ]
    return [
        property_table(rows),
        "",
        cell_table(result["cells"], measured is not None),
        "",
        *result["verdicts"],
        "",
        property_table(totals),
    ]


def cell_table(cells: list[dict[str, Any]], measured: bool) -> Any:
    """Return the table of a sweep.

    Args:
        cells: one per method, bits and group size.
        measured: show the metrics of a text.
    """
    rows = []
    for cell in cells:
        row = [
            cell["method"], str(cell["bits"]), str(cell["group_size"]), f"{cell['bits_per_weight']:.3f}",
            f"{cell['sqnr_db']:.1f}", f"{cell['worst_sqnr_db']:.1f}",
        ]  # fmt: skip
        if measured:
            agreed = cell["top1_agreement"]  # None in a cell whose error is too large to measure
            row += [format_number(cell["perplexity"]), format_number(cell["kl_divergence"], 3)]
            row.append("-" if agreed is None else f"{agreed:.1%}")
        rows.append([*row, cell["verdict"]])
    metrics = ("ppl", "KL", "top-1") if measured else ()
    columns = ("method", "bits", "groups", "bits/w", "SQNR dB", "worst", *metrics, "verdict")
    return data_table(columns, rows, left=("method", "verdict"))
