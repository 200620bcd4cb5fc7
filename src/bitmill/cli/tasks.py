"""The measurement of `bitmill eval --tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.options import split_list
from bitmill.cli.output import Output, data_table, property_table
from bitmill.report.tasks import task_table
from bitmill.report.text import format_mb, format_number

Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="T,T,...",
        help="Benchmark tasks to measure in place of a text, such as arc_easy,hellaswag,piqa,lambada,gsm8k.",
        show_default=False,
    ),
]
Limit = Annotated[int, typer.Option(metavar="N", help="First documents of each task that are asked; 0 for all.")]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code", help="Run, in a sandbox, the programs that the model writes for humaneval and mbpp."
    ),
]


def measure_tasks(
    model: str,
    tasks: str,
    limit: int,
    record_in: Path | None,
    output: Output,
    **options: Any,
) -> None:
    """Measure a model on tasks, record and print the figures.

    Args:
        model: the model.
        tasks: comma-separated names.
        limit: documents of each task; 0 for all.
        record_in: quantized folder to record the figures in.
        output: of the command.
        options: others of `bitmill.evaluate_tasks`.
    """
    from bitmill.checkpoint.record import check_recordable, record_tasks
    from bitmill.workflows.tasks import evaluate_tasks

    files = check_recordable(record_in) if record_in is not None else None
    found = evaluate_tasks(model, split_list(tasks), limit=limit or None, progress=output.progress, **options)
    result = {"model": model, **found, "reference": options.get("reference")}
    recorded = False
    try:
        if record_in is not None:
            record_tasks(record_in, result, files)
            recorded = True
    finally:  # printed even if it cannot be recorded, because measuring it took long
        output.result({**result, "recorded": recorded}, lambda: _render(result, recorded))


def _render(result: dict[str, Any], recorded: bool) -> list[Any]:
    header, *rows = task_table(result["tasks"])
    properties = [
        ("model", str(result["model"])),
        *(("reference", str(name)) for name in [result["reference"]] if name is not None),
        ("bits per weight", f"{result['bits_per_weight']:.3f}"),
        ("size", format_mb(result["size_bytes"])),
        ("time", f"{format_number(result['time_s'])} s"),
        ("peak memory", format_mb(result["peak_memory_bytes"])),
        *([("programs could reach", " and ".join(result["unprotected"]))] if result["unprotected"] else []),
        *([("recorded in", f"{result['model']}/report.json")] if recorded else []),
    ]
    return [property_table(properties), "", data_table(header, rows, left=("task",))]
