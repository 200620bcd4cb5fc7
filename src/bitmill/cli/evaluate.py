"""bitmill eval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from bitmill.cli.activations import Activations, rounded_to
from bitmill.cli.complete import complete_text
from bitmill.cli.options import (
    AnyModel,
    AsJson,
    Device,
    Kv,
    KvBits,
    KvSamples,
    KvSeqlen,
    KvSet,
    Seqlen,
    TrustRemoteCode,
    kv_arguments,
)
from bitmill.cli.output import Output, command_output, data_table, kv_cache_rows, property_table
from bitmill.cli.tasks import Limit, RunCode, Tasks, measure_tasks
from bitmill.errors import UsageError
from bitmill.report.describe import describe_amount
from bitmill.report.domains import domain_table, domains_of
from bitmill.report.text import format_mb, format_number, metric_rows

SPLITS = ("eval", "choose", "calib", "all")

Text = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="pydoc, suite for five domains and their mean, a .txt or .jsonl file, or hf:dataset.",
        autocompletion=complete_text,
    ),
]
Split = Annotated[str, typer.Option(help="Part of the text: eval, calib, all, or choose (of domains).")]
Windows = Annotated[
    int | None,
    typer.Option(
        metavar="W",
        help="Number of windows, of each domain for suite (40, or 8 of each domain); 0 for all of the text.",
        show_default=False,
    ),
]
Reference = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Float model to compare with.", show_default=False)
]
Record = Annotated[
    bool, typer.Option("--record", help="Add the measurement to the folder's report and model card.")
]


def evaluate(
    model: AnyModel,
    text: Text = "pydoc",
    split: Split = "eval",
    seqlen: Seqlen = 512,
    windows: Windows = None,
    reference: Reference = None,
    tasks: Tasks = None,
    limit: Limit = 200,
    run_code: RunCode = False,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    kv_samples: KvSamples = 16,
    kv_seqlen: KvSeqlen = None,
    record: Record = False,
    device: Device = "cpu",
    activations: Activations = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and with --reference the divergence from the float model; of an encoder, embeddings.

    With --tasks, measure accuracy on benchmark tasks instead.
    """
    if split not in SPLITS:
        raise UsageError(f"--split is {split!r}; use one of {', '.join(SPLITS)}.")
    with command_output(as_json) as output, rounded_to(activations):
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.reader import is_bitmill_folder
        from bitmill.checkpoint.record import check_recordable, record_measurement
        from bitmill.config.paths import user_path
        from bitmill.evaluation.answers import PROMPTS

        folder = user_path(model)
        if record and not is_bitmill_folder(folder):
            raise UsageError(f"--record writes into a quantized folder, and {model!r} is none; leave it out.")
        if tasks is not None and kv is not None:
            raise UsageError("--tasks are measured through an ordinary cache; leave --kv out.")
        if tasks is not None:
            options = {"reference": reference, "run_code": run_code, "device": device}
            options["trust_remote_code"] = trust_remote_code
            measure_tasks(model, tasks, limit, folder if record else None, output, **options)
            return
        files = check_recordable(folder) if record else None
        answers = record and reference is not None and kv is None  # for the folder's page
        result = api.evaluate(
            model,
            text=text,
            split=split,  # type: ignore[arg-type]
            seqlen=seqlen,
            windows=windows,
            reference=reference,
            prompts=PROMPTS if answers else (),
            device=device,
            progress=output.progress,
            trust_remote_code=trust_remote_code,
            **kv_arguments(kv, kv_bits, kv_set, kv_samples, kv_seqlen),
        )
        result = {"model": model, **result, "reference": reference}
        with _printed(output, result) as printed:
            if record:
                record_measurement(folder, result, files)
                printed["recorded"] = True


@contextmanager
def _printed(output: Output, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Print a result with `recorded`, also if it cannot be recorded, because measuring it took long."""
    printed = {**result, "recorded": False}
    try:
        yield printed
    finally:
        output.result(printed, lambda: _render(result, printed["recorded"]))


def _render(result: dict[str, Any], recorded: bool) -> list[Any]:
    """Return the figures and, for a text with several domains, a table of these."""
    domains = domains_of(result)
    means = f", means over {len(domains)} domains" if domains else ""
    rows = [
        ("model", str(result["model"])),
        (
            "text",
            f"{result['text']}, {result['split']} split, {describe_amount(result)}{means}",
        ),
        *(("reference", str(name)) for name in [result["reference"]] if name is not None),
        *metric_rows(result),
    ]
    if result.get("kv_method"):
        rows += kv_cache_rows(result)
        if calibration := result["kv_calibration"]:
            rows.append(("calibrated", "in the folder" if calibration == "folder" else f"on {calibration}"))
        if result["kv_on_calibration_text"]:
            rows.append(("warning", "measured on text that keys and values were calibrated on"))
    rows += [
        ("activations", result["activations"]),
        ("bits per weight", f"{result['bits_per_weight']:.3f}"),
        ("size", format_mb(result["size_bytes"])),
        ("time", f"{format_number(result['time_s'])} s"),
        ("peak memory", format_mb(result["peak_memory_bytes"])),
    ]
    if recorded:
        rows.append(("recorded in", f"{result['model']}/report.json"))
    table = domain_table(result)
    by_domain = ["", data_table(table.columns, table.rows, left=table.columns[:1])] if table else []
    return [property_table(rows), *by_domain]
