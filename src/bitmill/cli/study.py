"""bitmill study."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, Device, TrustRemoteCode
from bitmill.cli.output import facts, megabytes, number, working
from bitmill.errors import UsageError

_WORST = 5  # layers shown


def study(
    model: Annotated[
        str, typer.Argument(help="Demo model, Hugging Face folder or hub id, or .gguf file.", show_default=False)
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Also measure on this text: pydoc, a .txt or .jsonl file, hf:dataset.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="W", help="Windows of the text; 4 when left out.", show_default=False)
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(metavar="L", help="Tokens in a window; 512 when left out.", show_default=False)
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Shrink each range to the least weight error.")] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Find out which bits and group sizes a model tolerates, without calibration text."""
    if text is None and (windows is not None or seqlen is not None):
        raise UsageError("--windows and --seqlen cut up a text; name it with --text.")
    with working(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.sweep import sweep

        result = sweep(
            model,
            text_source=text,
            windows=4 if windows is None else windows,
            seqlen=512 if seqlen is None else seqlen,
            search=search,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=output.progress,
        )
        output.result(result, lambda: _readable(result))


def _readable(result: dict[str, Any]) -> list[Any]:
    measured = result["measured"]
    rows = [
        ("model", str(result["model"])),
        ("layers", f"{len(result['layers'])} ({result['quantized_weights']:,} weights)"),
        (
            "ranges",
            "shrunken to the least error" if result["search"] else "from the smallest to the largest weight",
        ),
    ]
    if measured:
        where = (
            f"{measured['windows']} x {measured['seqlen']} tokens of {measured['text']}, {measured['split']} split"
        )
        rows.append(("text", f"{where}; perplexity of the float model {number(measured['reference_perplexity'])}"))
    sufferers = [
        f"{layer['name']} ({layer['relative_error']:.2f} x the mean)" for layer in result["layers"][:_WORST]
    ]
    kinds = [f"{kind['name']} {kind['relative_error']:.2f}" for kind in result["kinds"]]
    after = [
        ("suffer most", ", ".join(sufferers)),
        ("by kind", ", ".join(kinds) + " x the mean"),
        ("time", f"{number(result['time_s'])} s"),
        ("peak memory", megabytes(result["peak_memory_bytes"])),
    ]
    return [
        facts(rows),
        "",
        _table(result["cells"], measured is not None),
        "",
        *result["verdicts"],
        "",
        facts(after),
    ]


def _table(cells: list[dict[str, Any]], measured: bool) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("bits", "groups", "bits/w", "SQNR dB", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("ppl", "KL", "top-1") if measured else ():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for cell in cells:
        row = [
            cell["method"], str(cell["bits"]), str(cell["group_size"]), f"{cell['bits_per_weight']:.3f}",
            f"{cell['sqnr_db']:.1f}", f"{cell['worst_sqnr_db']:.1f}",
        ]  # fmt: skip
        if measured:
            agreed = cell["top1_agreement"]  # None in a cell that is beyond measuring
            row += [number(cell["perplexity"]), number(cell["kl_divergence"], 3)]
            row.append("-" if agreed is None else f"{agreed:.1%}")
        table.add_row(*row, cell["verdict"])
    return table
