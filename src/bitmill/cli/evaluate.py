"""bitmill eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.options import (
    AsJson,
    Device,
    Kv,
    KvBits,
    KvSamples,
    KvSeqlen,
    KvSet,
    TrustRemoteCode,
    pairs,
)
from bitmill.cli.output import facts, figure_value, kv_rows, megabytes, number, working
from bitmill.errors import UsageError

SPLITS = ("eval", "calib", "all")


def evaluate(
    model: Annotated[str, typer.Argument(help="Quantized folder, or any float model.", show_default=False)],
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help="pydoc, a .txt or .jsonl file, or hf:dataset.")
    ] = "pydoc",
    split: Annotated[
        str, typer.Option(help="eval (the last fifth of the text), calib (the rest) or all.")
    ] = "eval",
    seqlen: Annotated[int, typer.Option(metavar="L", help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(metavar="W", help="How many windows; 0 for all there are.")] = 40,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Float model to compare with.", show_default=False),
    ] = None,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    kv_samples: KvSamples = 16,
    kv_seqlen: KvSeqlen = None,
    record: Annotated[
        bool, typer.Option("--record", help="Add the measurement to the folder's report and model card.")
    ] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and with --reference the divergence from the float model; of an encoder, embeddings."""
    if split not in SPLITS:
        raise UsageError(f"--split is {split!r}; use one of {', '.join(SPLITS)}.")
    with working(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.reader import is_ours
        from bitmill.checkpoint.record import record_measurement

        if record and not is_ours(Path(model)):
            raise UsageError(f"--record writes into a quantized folder, and {model!r} is none; leave it out.")
        result = api.evaluate(
            model,
            text_source=text,
            split=split,  # type: ignore[arg-type]
            seqlen=seqlen,
            windows=windows or None,
            reference=reference,
            kv=kv,
            kv_bits=kv_bits,
            kv_options=pairs(kv_set, "--kv-set"),
            kv_samples=kv_samples,
            kv_seqlen=kv_seqlen,
            device=device,
            progress=output.progress,
            trust_remote_code=trust_remote_code,
        )
        result = {"model": model, **result, "reference": reference}
        if record:
            record_measurement(Path(model), result)
        output.result({**result, "recorded": record}, lambda: [_readable(result, record)])


def _readable(result: dict[str, Any], recorded: bool) -> Any:
    from bitmill.report.metrics import metric_columns

    rows = [
        ("model", str(result["model"])),
        ("text", f"{result['text']}, {result['split']} split, {result['windows']} x {result['seqlen']} tokens"),
        *(("reference", str(name)) for name in [result["reference"]] if name is not None),
    ]
    known = [figure for figure in metric_columns([result]) if result.get(figure.key) is not None]
    rows += [(figure.name, figure_value(figure, result)) for figure in known]
    if result.get("kv_method"):
        rows += kv_rows(result)
        if result["kv_calibration"]:
            where = result["kv_calibration"]
            rows.append(("calibrated", "in the folder" if where == "folder" else f"on {where}"))
        if result["kv_on_calibration_text"]:
            rows.append(("mind", "measured on text that keys and values were calibrated on"))
    rows += [
        ("bits per weight", f"{result['bits_per_weight']:.3f}"),
        ("size", megabytes(result["size_bytes"])),
        ("time", f"{number(result['time_s'])} s"),
        ("peak memory", megabytes(result["peak_memory_bytes"])),
    ]
    if recorded:
        rows.append(("recorded in", f"{result['model']}/report.json"))
    return facts(rows)
