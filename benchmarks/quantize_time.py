"""Time of quantizing SmolLM2-135M, in units of two float forward passes over the calibration windows.

Two passes are what block-by-block quantization costs at least when it runs every block once to collect and
once to go on; the bound leaves little beyond that for the solver, loading and writing together.

    python benchmarks/quantize_time.py                  # 128 windows of 512 tokens; minutes on an idle machine
    python benchmarks/quantize_time.py --samples 8      # small runs overstate the ratio: some costs are fixed
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bitmill
from bitmill.calibration.streams import BATCH_TOKENS
from bitmill.checkpoint.writer import FolderSink
from bitmill.data import text
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.sources.open import open_source

BOUND = 1.4
SANE = 2.0  # times the float perplexity: beyond it, the time was spent on nothing
WINDOWS = 2  # held-out windows of the sanity check


class Clock(Progress):
    """Seconds of each phase of `quantize`, by its name in the progress display."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._since = "", time.perf_counter()

    def start(self, task: str, total: int) -> None:
        self._enter(task)

    def finish(self) -> None:
        self._enter("finish")

    def _enter(self, phase: str) -> None:
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def inside(self, owner: type, name: str, label: str) -> None:
        """Also count the seconds spent in a method."""
        method: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - began

        setattr(owner, name, counted)


def time_quantize(model: str, method: str, out: Path, samples: int, seqlen: int, options: dict[str, Any]) -> Any:
    """Quantize once.

    Args:
        model: Name of the model.
        method: Name of the method.
        out: Folder of the result.
        samples: Number of calibration windows.
        seqlen: Tokens of a window.
        options: Options of the method.

    Returns:
        Seconds in all and by phase, and peak memory.
    """
    clock = Clock()
    clock.inside(StreamedModel, "load_block", "loading blocks")
    clock.inside(FolderSink, "write", "writing blocks")
    began, cpu = time.perf_counter(), time.process_time()
    outcome = bitmill.quantize(
        model,
        method,
        out=out,
        calib=bitmill.CalibrationData(samples=samples, seqlen=seqlen),
        measure=0,
        progress=clock,
        **options,
    )
    total, cpu = time.perf_counter() - began, time.process_time() - cpu
    clock.finish()
    phases = {
        "opening and reading": clock.seconds["opening the model"] + clock.seconds["reading text and model"],
        "loading blocks": clock.seconds["loading blocks"],
        "writing": clock.seconds["writing blocks"] + clock.seconds["finish"],
        "blocks without loading and writing": clock.seconds["quantize"]
        - clock.seconds["loading blocks"]
        - clock.seconds["writing blocks"],
    }
    peak = outcome.summary["peak_memory_bytes"]
    return {"time_s": total, "cpu_s": cpu, "peak_memory_bytes": peak, "phases_s": phases}


@torch.no_grad()
def time_pass(run: Callable[[torch.Tensor], Any], windows: torch.Tensor) -> dict[str, float]:
    """Return the seconds of one pass over the windows, batched as in `quantize`, after one batch of warm-up.

    Args:
        run: The forward pass.
        windows: Token ids (windows, length).
    """
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    run(batches[0])
    began, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        run(batch)
    return {"time_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def benchmark(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    options = {} if arguments.bits is None else {"bits": arguments.bits}
    # first, so that the peak memory is that of quantizing and not of the float model below
    quantized = time_quantize(arguments.model, arguments.method, out, arguments.samples, arguments.seqlen, options)

    model: Any = bitmill.load(arguments.model)
    tokenizer = open_source(arguments.model).tokenizer()
    ids = text.split_stream(text.token_stream("pydoc", tokenizer), "calib")
    windows = text.calibration_windows(ids, arguments.samples, arguments.seqlen)
    passes = [time_pass(lambda tokens: model(tokens, use_cache=False), windows) for _ in range(2)]
    headless = time_pass(lambda tokens: model.base_model(tokens, use_cache=False), windows)

    common: Any = {"seqlen": arguments.seqlen, "windows": WINDOWS, "tokenizer": tokenizer}
    reference = bitmill.evaluate(model, **common)["perplexity"]
    perplexity = bitmill.evaluate(bitmill.load(out), **common)["perplexity"]
    two = sum(p["time_s"] for p in passes)
    return {
        "model": arguments.model,
        "method": arguments.method,
        "options": options,
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
        "threads": torch.get_num_threads(),
        "quantize": quantized,
        "two_passes_s": two,
        "passes": passes,
        "pass_without_head": headless,
        "ratio": quantized["time_s"] / two,
        "ratio_cpu": quantized["cpu_s"] / sum(p["cpu_s"] for p in passes),
        "ratio_without_head": quantized["time_s"] / (2 * headless["time_s"]),
        "bound": BOUND,
        "perplexity": perplexity,
        "reference_perplexity": reference,
        "sane": math.isfinite(perplexity) and perplexity < SANE * reference,
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['method']}, {result['samples']} x {result['seqlen']} tokens, {result['threads']} threads"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    quantized, passes = result["quantize"], result["passes"]
    table.add_row("quantize", f"{quantized['time_s']:.1f} s")
    for name, seconds in quantized["phases_s"].items():
        table.add_row(f"  {name}", f"{seconds:.1f} s")
    table.add_row("two float passes", f"{result['two_passes_s']:.1f} s")
    table.add_row("  one by one", " + ".join(f"{p['time_s']:.1f} s" for p in passes))
    table.add_row("a pass without the head", f"{result['pass_without_head']['time_s']:.1f} s")
    colour = "green" if result["ratio"] <= BOUND else "red"
    table.add_row("quantize / two passes", f"[{colour}]{result['ratio']:.2f}[/] (bound {BOUND})")
    table.add_row("  in CPU time, which others disturb less", f"{result['ratio_cpu']:.2f}")
    table.add_row("  against passes without the head", f"{result['ratio_without_head']:.2f}")
    table.add_row("peak memory of quantize", f"{quantized['peak_memory_bytes'] / 1e9:.2f} GB")
    colour = "green" if result["sane"] else "red"
    perplexity = f"[{colour}]{result['perplexity']:.2f}[/] (float {result['reference_perplexity']:.2f})"
    table.add_row(f"perplexity of {WINDOWS} held-out windows", perplexity)
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, help="4 for gptq; the method's own default for others")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.bits is None and arguments.method == "gptq":
        arguments.bits = 4
    with tempfile.TemporaryDirectory() as folder:
        result = benchmark(arguments, Path(folder) / "out")
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
    if not result["sane"]:
        print(f"missed: the perplexity is {result['perplexity']:.2f}.", file=sys.stderr)
    if result["ratio"] > BOUND:
        print(f"missed: quantizing took {result['ratio']:.2f} times two passes.", file=sys.stderr)
    return 0 if result["sane"] and result["ratio"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
