"""Estimates of `quantize` against the runs that they estimate, in turns, each in a process of its own.

    python benchmarks/estimate.py                              # rtn and gptq of SmolLM2; half an hour
    python benchmarks/estimate.py --methods rtn gptq gptqt pvq omniquant --models smollm2-135m FOLDER --runs 2

On a busy machine seconds differ from one minute to the next; seconds of the processor differ less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BOUND = 0.25  # largest relative error
KEYS = ("seconds", "cpu_seconds", "peak_memory_bytes", "size_bytes")


def run_job(options: dict[str, Any]) -> dict[str, Any]:
    """Estimate or quantize in this process; clocks run for the call alone, after all imports."""
    from bitmill import api

    calibration = api.CalibrationData(samples=options.pop("samples"), seqlen=options.pop("seqlen"))
    kind, out = options.pop("kind"), options.pop("out")
    began, cpu = time.perf_counter(), time.process_time()
    if kind == "estimate":
        result = api.estimate(calib=calibration, **options).to_dict()
    else:
        summary = api.quantize(calib=calibration, out=out, **options).summary
        result = {key: summary[key] for key in ("peak_memory_bytes", "size_bytes")}
        result |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {**result, "took_s": time.perf_counter() - began, "took_cpu_s": time.process_time() - cpu}


def call(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Estimate or quantize in a new process.

    Args:
        kind: "estimate" or "quantize".
        options: arguments of the call.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = {**options, "kind": kind, "out": str(Path(folder) / "out")}
        command = [sys.executable, __file__, "--job", json.dumps(given)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(options: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an estimate and of the run, and their ratios."""
    estimated, real = call("estimate", options), call("quantize", options)
    return {
        **options,
        "estimated": estimated,
        "real": real,
        "ratio": {key: estimated[key] / real[key] for key in KEYS},
        "share": estimated["took_cpu_s"] / real["took_cpu_s"],
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="estimate / run, and share of the run that the estimate takes", title_justify="left")
    for column in ("model", "method", "windows", "s", "cpu s", "GB", "bytes", "share of cpu"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    for row in results:
        cells = []
        for key, scale in zip(KEYS, (1, 1, 1e-9, 1)):
            ratio, pair = row["ratio"][key], (row["estimated"][key] * scale, row["real"][key] * scale)
            colour = "green" if abs(ratio - 1) <= BOUND else "red"
            cells.append(f"{pair[0]:,.5g} / {pair[1]:,.5g} = [{colour}]{ratio:.2f}[/]")
        table.add_row(row["model"], row["method"], str(row["samples"]), *cells, f"{row['share']:.0%}")
    Console(width=200).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, help="the method's own default without it")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a window")
    parser.add_argument("--runs", type=int, default=1, help="turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        print(json.dumps(run_job(arguments.job)))
        return 0
    results = []
    for _ in range(arguments.runs):
        for model in arguments.models:
            for method in arguments.methods:
                options = {"model": model, "method": method, "samples": arguments.samples}
                options |= {"seqlen": arguments.seqlen, **({"bits": arguments.bits} if arguments.bits else {})}
                results.append(compare(options))
                if arguments.json:
                    print(json.dumps(results[-1]), flush=True)
    if not arguments.json:
        show(results)
    missed = [row for row in results if any(abs(row["ratio"][key] - 1) > BOUND for key in KEYS)]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
