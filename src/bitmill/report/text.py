"""Results as plain text: figures, measurements and the summary of a quantization."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from bitmill.report import formatting
from bitmill.report.budget import describe_budget
from bitmill.report.describe import (
    describe_amount,
    describe_attention,
    describe_format,
    describe_measured_cache,
    describe_options,
    describe_simulation,
)
from bitmill.report.domains import domains_of, worst_domain
from bitmill.report.metrics import MetricColumn, metric_columns


def format_number(value: Any, digits: int = 4) -> str:
    """Format a number with `digits` significant digits; a dash for None, NaN and infinities."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else f"{value:,}"


def format_rows(rows: Sequence[tuple[str, str]]) -> str:
    """Format (name, value) pairs as lines, with the values below one another."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def format_mb(size_bytes: int) -> str:
    """Format a size in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.1f} MB"


def format_metric(metric: MetricColumn, measured: dict[str, Any]) -> str:
    """Format one metric of a measurement.

    Args:
        metric: key, unit and kind of the value.
        measured: the measurement.

    Returns:
        The value with its unit; a dash where it is missing.
    """
    value = measured.get(metric.key)
    if value is None:
        return "-"
    return f"{value:.2%}" if metric.share else f"{format_number(value, 5)} {metric.unit}".rstrip()


def metric_rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of every metric that a measurement has."""
    present = [metric for metric in metric_columns([measured]) if measured.get(metric.key) is not None]
    return [(metric.name, format_metric(metric, measured) + _interval(metric, measured)) for metric in present]


def _interval(metric: MetricColumn, measured: dict[str, Any]) -> str:
    """Return the interval of a metric behind its value; empty where there is none."""
    ends = measured.get(metric.interval) if metric.interval else None
    return f" (95 %: {' to '.join(format_number(end, 3) for end in ends)})" if ends else ""


def describe_measurement(measured: dict[str, Any]) -> str:
    """Return one measurement in a line."""
    kept = {metric.name for metric in metric_columns([measured]) if not metric.optional}
    metrics = ", ".join(f"{name} {value}" for name, value in metric_rows(measured) if name in kept)
    if (worst := worst_domain(measured)) is not None:
        largest = domains_of(measured)[worst]["kl_divergence"]
        metrics += f", largest KL divergence {format_number(largest, 3)} nats in {worst}"
    text = f"{describe_amount(measured)} of {measured.get('text')}"
    return f"{metrics}{describe_measured_cache(measured)} ({text}, {measured.get('split')} split)"


def describe_kv_plan(kv: dict[str, Any]) -> str:
    """Return the packing of keys and values, from the `kv` of a report, in a line."""
    options = dict(kv["method"])
    name = options.pop("kv method")
    size = f", {kv['size_bytes']:,} bytes of calibration" if kv["size_bytes"] else ""
    bits = f"{kv['bits_per_element']:.3f} bits per number in full pages"
    return f"{name} ({describe_options(options)}): {bits}{size}"


def describe_plan(plan: dict[str, Any]) -> str:
    """Return method, bits and size of a quantization to come, in a line."""
    return f"{plan['method']}, {plan['bits_per_weight']:.3f} bits per weight: {format_mb(plan['size_bytes'])}"


def describe_size(summary: dict[str, Any]) -> str:
    """Return the size of a quantized model and its share of the original, in a line."""
    text = format_mb(summary["size_bytes"])
    if summary.get("size_ratio") is not None:
        original = format_mb(summary["original_bytes"])
        text += f", tensors {summary['size_ratio']:.1%} of the original's {original}"
    parts = f"{format_mb(summary['unquantized_bytes'])} in float"
    if summary["head_bytes"]:
        parts += f", {format_mb(summary['head_bytes'])} embedding and head"
    return f"{text} ({parts})"


def storage_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) rows on formats, bits and size, from the summary of a quantization."""
    rows = []
    for entry in summary["formats"]:
        count = f" in {entry['layers']:,} layers" if len(summary["formats"]) > 1 else ""
        rows.append(("format", describe_format(entry["format"]) + count))
        if simulation := describe_simulation(entry["format"]):
            rows.append(("inputs", simulation))
    if attention := summary.get("attention"):
        rows.append(("attention", describe_attention(attention)))
    if summary["formats"]:
        rows.append(("layers", f"{summary['layers']:,} ({summary['quantized_weights']:,} weights)"))
    bits = f"{summary['bits_per_weight']:.3f}"
    if summary["head_bytes"]:
        bits += f", of embedding and head {summary['head_bits_per_weight']:.3f}"
    rows.append(("bits per weight", bits))
    if note := summary.get("head_note"):
        rows.append(("note", note))
    if kv := summary["kv"]:
        rows.append(("keys and values", describe_kv_plan(kv)))
    return [*rows, ("size", describe_size(summary))]


def summary_rows(model: str, summary: dict[str, Any], commands: list[str]) -> list[tuple[str, str]]:
    """Return (name, value) rows of a finished quantization.

    Args:
        model: its name as given.
        summary: the summary, with the reason for the method in `chosen` where none was named.
        commands: what can be done next.
    """
    reason = f" ({summary['chosen']})" if summary.get("chosen") else ""
    rows = [("model", model), ("method", summary["method"] + reason), *storage_rows(summary)]
    if budget := summary.get("budget"):
        rows += describe_budget(budget)
    if summary.get("dry_run"):
        return [*rows, ("written", "nothing (dry run)")]
    rows += [("measured", describe_measurement(measured)) for measured in summary["measured"]]
    time = formatting.duration(summary["time_s"]).replace(formatting.GAP, " ")
    rows.append(("time, peak memory", f"{time}, {format_mb(summary['peak_memory_bytes'])}"))
    rows.append(("written to", str(summary["out"])) if summary["out"] else ("quantized", "in place"))
    return [*rows, *(("next" if number == 0 else "", command) for number, command in enumerate(commands))]


def training_rows(summary: dict[str, Any], teacher: str) -> list[tuple[str, str]]:
    """Return (name, value) rows of a finished training.

    Args:
        summary: of the training.
        teacher: the float model as given.
    """
    before, after = summary["before"], summary["after"]
    present = [metric for metric in metric_columns([before]) if before.get(metric.key) is not None]
    changes = [(m.name, f"{format_metric(m, before)} before, {format_metric(m, after)} after") for m in present]
    windows = summary["windows"]
    time = formatting.duration(summary["time_s"]).replace(formatting.GAP, " ")
    return [
        ("folder", summary["folder"]),
        *(("teacher", name) for name in [summary["teacher"]] if name),
        (
            "trained",
            f"{summary['parameters']:,} parameters on {windows['trained_on']} windows of {windows['source']}",
        ),
        ("steps", f"{summary['steps']:,} at rate {summary['rate']:g}; " + _best(summary["best_step"])),
        *(("stopped", sentence) for sentence in [summary.get("stopped")] if sentence),
        ("measured on", f"{summary['held_apart']} windows that were not trained on"),
        *changes,
        ("time, peak memory", f"{time}, {format_mb(summary['peak_memory_bytes'])}"),
        ("written to", summary["out"]),
        (
            "next",
            f"bitmill eval {shlex.quote(summary['out'])} --reference {shlex.quote(teacher)}",
        ),
    ]


def _best(step: int) -> str:
    return f"best after step {step:,}" if step else "no state was better than the start, which is written"


def next_commands(model: str, out: str, auto_class: str, chat: bool) -> list[str]:
    """Return commands to go on with a quantized folder.

    Args:
        model: the float model as given.
        out: the folder.
        auto_class: class of transformers that loads it.
        chat: it has a chat template.
    """
    folder, source = shlex.quote(out), shlex.quote(model)
    generates = auto_class == "AutoModelForCausalLM"
    return [
        *([f'bitmill generate {folder} --prompt "Once upon a time"'] if generates else []),
        *([f"bitmill chat {folder}"] if generates and chat else []),
        f"bitmill eval {folder} --reference {source}",
        f"{auto_class}.from_pretrained({out!r})  # after import bitmill",
    ]
