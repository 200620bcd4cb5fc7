"""bitmill quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.output import facts, measured_row, megabytes, number, working
from bitmill.errors import UsageError
from bitmill.report.words import spelled

FAVOURITES = ("gptqt", "gptq")  # the default method is the first one there is


def quantize(
    model: Annotated[
        str, typer.Argument(help="Demo model, Hugging Face folder or hub id, or .gguf file.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Named method (see bitmill methods) or recipe .yaml; gptqt when left out.", show_default=False
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="B", help="Short for --set bits=B.", show_default=False)
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="G",
            help="Short for --set group_size=G: input columns that share a scale, row (-1) or tensor (0).",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the method; repeatable.", show_default=False),
    ] = None,
    calib: Annotated[
        str, typer.Option(metavar="SOURCE", help="Calibration text: pydoc, a .txt or .jsonl file, hf:dataset.")
    ] = "pydoc",
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(metavar="L", help="Tokens in a window.")] = 512,
    seed: Annotated[int, typer.Option(metavar="S", help="Which windows are drawn.")] = 0,
    measure: Annotated[
        int, typer.Option(metavar="W", help="Held-out windows to measure on meanwhile; 0 for none.")
    ] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be stored, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a model into a folder that transformers can load."""
    options = method_options(bits, group_size, settings or [])
    hint = "interrupted" if dry_run else "interrupted; continue with --resume"
    with working(as_json, hint) as output:
        output.progress.start("starting", 0)
        from bitmill import api

        outcome = api.quantize(
            model,
            method or default_method(),
            out=out,
            calibration=api.Calibration(calib, samples, seqlen, seed),
            measure=measure,
            device=device,
            resume=resume,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
            progress=output.progress,
            **options,
        )
        data = {"model": model, **outcome.summary}
        output.result(data, lambda: [_readable(model, outcome.summary, dry_run)])


def method_options(bits: str | None, group_size: str | None, settings: list[str]) -> dict[str, Any]:
    """Options of a method from the command line, as strings. Raises UsageError."""
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set wants KEY=VALUE, not {setting!r}; for example --set damp=0.05.")
        if key in options:
            raise UsageError(
                f"--set gives {key!r} twice, as {options[key]!r} and {value.strip()!r}; give it once."
            )
        options[key] = value.strip()
    for key, shortcut in (("bits", bits), ("group_size", group_size)):
        if shortcut is None:
            continue
        if key in options:
            flag = "--" + key.replace("_", "-")
            raise UsageError(f"{key!r} is given twice, as {flag} {shortcut} and --set {key}={options[key]}.")
        options[key] = shortcut
    return options


def default_method() -> str:
    """The method used when none is named."""
    from bitmill.recipe import METHODS

    return next(name for name in FAVOURITES if name in METHODS.names())


def _readable(model: str, summary: dict[str, Any], dry_run: bool) -> Any:
    rows = [
        ("model", model),
        ("method", summary["method"]),
        ("format", spelled(summary["format"])),
        ("layers", f"{summary['layers']:,} ({summary['quantized_weights']:,} weights)"),
        ("bits per weight", f"{summary['bits_per_weight']:.3f}"),
        ("size", f"{megabytes(summary['size_bytes'])}, {megabytes(summary['unquantized_bytes'])} of it in float"),
    ]
    if dry_run:
        return facts([*rows, ("written", "nothing, this was a dry run")])
    for measured in summary["measured"]:
        rows.append(("measured", measured_row(measured)))
    rows += [
        ("time", f"{number(summary['time_s'])} s"),
        ("peak memory", megabytes(summary["peak_memory_bytes"])),
        ("written to", str(summary["out"])),
    ]
    return facts(rows)
