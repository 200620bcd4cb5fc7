"""bitmill sweep."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, Device, Model, TrustRemoteCode
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.errors import UsageError
from bitmill.report.text import format_mb, format_number
from bitmill.report.verdicts import size_name

_WORST_LAYERS = 5  # listed
_FORMAT = {"weight": "method", "input": "name"}  # key of a cell and title of its column

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
    typer.Option(
        metavar="W", help="With --text or --calib: number of windows; 4 when left out.", show_default=False
    ),
]
Seqlen = Annotated[
    int | None,
    typer.Option(
        metavar="L", help="With --text or --calib: tokens per window; 512 when left out.", show_default=False
    ),
]
Search = Annotated[bool, typer.Option("--search", help="Shrink each range to the least squared weight error.")]

InputsOfLayers = Annotated[
    bool,
    typer.Option("--activations", help="Round the inputs of layers (activations) in place of their weights."),
]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="With --activations: text that gives the inputs of layers; those of --text, or random ones, without.",
        show_default=False,
    ),
]


def sweep(
    model: Model,
    text: Text = None,
    windows: Windows = None,
    seqlen: Seqlen = None,
    search: Search = False,
    activations: InputsOfLayers = False,
    calib: Calib = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Round every layer at many bits and group sizes, and report which a model tolerates, without calibration."""
    if calib is not None and not activations:
        raise UsageError("--calib gives the inputs of layers; add --activations.")
    if text is None and calib is None and (windows is not None or seqlen is not None):
        raise UsageError("--windows and --seqlen divide a text; name it with --text or --calib.")
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.sweep.run import sweep

        result = sweep(
            model,
            text=text,
            windows=4 if windows is None else windows,
            seqlen=512 if seqlen is None else seqlen,
            search=search,
            activations=activations,
            calib=calib,
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
        _rounded(result),
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
        cell_table(result["cells"], measured is not None, result["of"]),
        "",
        *result["verdicts"],
        "",
        property_table(totals),
    ]


def _rounded(result: dict[str, Any]) -> tuple[str, str]:
    """Return the line that says which numbers were rounded, and what their errors are those of."""
    inputs = result["inputs"]
    if inputs is None:
        return "ranges", "shrunk to the least error" if result[
            "search"
        ] else "from the smallest to the largest weight"
    if inputs["source"] == "random":
        return "inputs", f"{inputs['tokens']} random tokens, normal numbers without outliers; errors of outputs"
    windows = f"{inputs['windows']} x {inputs['seqlen']} tokens of {inputs['text']}, {inputs['split']} split"
    return "inputs", f"those of the float model on {windows}; errors of outputs"


def cell_table(cells: list[dict[str, Any]], measured: bool, of: str = "weight") -> Any:
    """Return the table of a sweep.

    Args:
        cells: one per format, bits and group size.
        measured: show the metrics of a text.
        of: "weight" or "input", the numbers that were rounded.
    """
    rows = []
    for cell in cells:
        row = [
            str(cell[_FORMAT[of]]), str(cell["bits"]), size_name(cell["group_size"], of),
            f"{cell[f'bits_per_{of}']:.3f}", f"{cell['sqnr_db']:.1f}", f"{cell['worst_sqnr_db']:.1f}",
        ]  # fmt: skip
        if measured:
            agreed = cell["top1_agreement"]  # None in a cell whose error is too large to measure
            row += [format_number(cell["perplexity"]), format_number(cell["kl_divergence"], 3)]
            row.append("-" if agreed is None else f"{agreed:.1%}")
        rows.append([*row, cell["verdict"] or "-"])
    metrics = ("ppl", "KL", "top-1") if measured else ()
    columns = (_FORMAT[of], "bits", "groups", f"bits/{of[0]}", "SQNR dB", "worst", *metrics, "verdict")
    return data_table(columns, rows, left=(_FORMAT[of], "verdict"))
