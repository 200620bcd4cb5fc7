"""bitmill quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitmill.cli.options import (
    AsJson,
    Device,
    HeadBits,
    Kv,
    KvBits,
    KvSamples,
    KvSeqlen,
    KvSet,
    TrustRemoteCode,
    pairs,
)
from bitmill.cli.output import facts, kv_facts, measured_row, megabytes, number, working
from bitmill.errors import UsageError
from bitmill.recipes.defaults import WITHIN_MINUTES
from bitmill.report.describe import describe_format

NONE = "none"  # the method that leaves weights as they are


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
            help="Named method or recipe (see bitmill methods, bitmill recipes), or a .yaml file; the leader of "
            "the leaderboard at these bits when left out; none leaves the weights as they are, for --kv alone.",
            show_default=False,
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
    format: Annotated[
        str | None,
        typer.Option(metavar="PART", help="Another weight format, NAME or NAME:key=value,...", show_default=False),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(metavar="PART", help="Another solver, spelled likewise.", show_default=False)
    ] = None,
    transform: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="A transform more; repeatable.", show_default=False)
    ] = None,
    tuner: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="A tuner more; repeatable.", show_default=False)
    ] = None,
    sparse: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Keep this share of the weights apart in 16 bits.", show_default=False),
    ] = None,
    propagate: Annotated[
        Literal["quantized", "float"],
        typer.Option(help="Whose outputs later blocks are calibrated on: the quantized or the float blocks'."),
    ] = "quantized",
    within: Annotated[
        float, typer.Option(metavar="MINUTES", help="Without --method: how long the leader may take.")
    ] = WITHIN_MINUTES,
    calib: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Calibration text: pydoc, self, a .txt or .jsonl file, hf:dataset."),
    ] = "pydoc",
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(metavar="L", help="Tokens in a window.")] = 512,
    seed: Annotated[int, typer.Option(metavar="S", help="Which windows are drawn.")] = 0,
    measure: Annotated[
        int, typer.Option(metavar="W", help="Held-out windows to measure on meanwhile; 0 for none.")
    ] = 4,
    head_bits: HeadBits = None,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    kv_samples: KvSamples = 16,
    kv_seqlen: KvSeqlen = None,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be stored, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a folder that transformers can load."""
    options = method_options(bits, group_size, settings or [])
    hint = "interrupted" if dry_run else "interrupted; continue with --resume"
    with working(as_json, hint) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.recipes.compose import compose, find_recipe, from_parts
        from bitmill.recipes.defaults import leading_recipe

        parts = (format, solver, transform, tuner)
        if method == NONE:
            if any(parts) or sparse is not None:
                raise UsageError("--method none leaves the weights as they are; leave out the parts of a recipe.")
            base, reason = None, ""
        elif method:
            base, reason = find_recipe(method, options), ""
        elif format and solver:  # which leave nothing of a leader but what it adds to them
            base, reason = from_parts(format, solver, options), ""
            format = solver = None
        else:
            base, reason = leading_recipe(options, within)
        recipe = base and compose(
            base,
            format=format,
            solver=solver,
            transforms=transform or (),
            tuners=tuner or (),
            sparse=sparse,
        )
        outcome = api.quantize(
            model,
            recipe or NONE,
            out=out,
            calibration=api.Calibration(calib, samples, seqlen, seed),
            measure=measure,
            device=device,
            resume=resume,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
            propagate=propagate,
            head_bits=head_bits,
            kv=kv,
            kv_bits=kv_bits,
            kv_options=pairs(kv_set, "--kv-set"),
            kv_samples=kv_samples,
            kv_seqlen=kv_seqlen,
            **(options if base is None else {}),
            progress=output.progress,
        )
        why = {"chosen": reason} if reason else {}
        data = {"model": model, **why, **outcome.summary}
        output.result(data, lambda: [_readable(model, outcome.summary, dry_run, reason)])


def method_options(bits: str | None, group_size: str | None, settings: list[str]) -> dict[str, Any]:
    """Options of a method from the command line, as strings. Raises UsageError."""
    options = pairs(settings)
    for key, shortcut in (("bits", bits), ("group_size", group_size)):
        if shortcut is None:
            continue
        if key in options:
            flag = "--" + key.replace("_", "-")
            raise UsageError(f"{key!r} is given twice, as {flag} {shortcut} and --set {key}={options[key]}.")
        options[key] = shortcut
    return options


def _readable(model: str, summary: dict[str, Any], dry_run: bool, reason: str) -> Any:
    rows = [
        ("model", model),
        ("method", f"{summary['method']} ({reason})" if reason else summary["method"]),
    ]
    if summary["format"]:
        rows += [
            ("format", describe_format(summary["format"])),
            ("layers", f"{summary['layers']:,} ({summary['quantized_weights']:,} weights)"),
        ]
    rows.append(("bits per weight", f"{summary['bits_per_weight']:.3f}"))
    if kv := summary["kv"]:
        rows.append(("keys and values", kv_facts(kv)))
    size = f"{megabytes(summary['size_bytes'])}, {megabytes(summary['unquantized_bytes'])} of it in float"
    if summary["head_bytes"]:
        rows.append(("embedding and head", f"{summary['head_bits_per_weight']:.3f} bits per weight"))
        size += f", {megabytes(summary['head_bytes'])} embedding and head"
    rows.append(("size", size))
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
