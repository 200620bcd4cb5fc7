"""The results of a comparison in order, with the best variants, a headline, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bitmill.report import formatting
from bitmill.report.domains import worst_domain
from bitmill.report.escape import terminal_text
from bitmill.report.results import FloatModel, Results, Variant
from bitmill.report.tasks import tasks_of_models

CLOSE = 1.25  # ratio to the float model's perplexity up to which the headline calls a variant close

_COLUMNS: dict[str, Callable[[Any], str]] = {
    "perplexity": lambda v: f"{v:.3f}",
    "kl_divergence": lambda v: f"{v:.4f}",
    "worst_domain": str,
    "top1_agreement": lambda v: f"{v:.1%}",
    "bits_per_weight": lambda v: f"{v:.3f}",
    "size_bytes": lambda v: f"{v / 1e6:.1f} MB",
    "time_s": lambda v: f"{v:.0f} s",
}
_OPTIONAL = ("worst_domain",)  # columns only where a row has a value
_TITLES = {  # short: the table fits 80 columns
    "perplexity": "ppl",
    "kl_divergence": "KL to float",
    "worst_domain": "worst domain",
    "top1_agreement": "top-1",
    "bits_per_weight": "bits/w",
    "size_bytes": "on disk",
    "time_s": "made in",
}


def label(variant: Variant) -> str:
    """Return the display name: `gptq 3-bit`, or the name of the recipe."""
    bits = f"-{variant.bits}bit"
    if not variant.name.endswith(bits):
        return variant.name
    return variant.method if variant.method.endswith(bits) else f"{variant.method} {variant.bits}-bit"


def in_order(results: Results) -> list[Variant]:
    """Return the variants by falling bits, then rising perplexity; unmeasured ones come last."""

    def place(variant: Variant) -> tuple[bool, int, float, str]:
        measured = variant.perplexity
        return measured is None, -(variant.bits or 0), measured or 0.0, variant.name

    return sorted(results.variants, key=place)


def best_of_bits(results: Results) -> list[Variant]:
    """Return the variant of lowest perplexity for every number of bits, the most bits first."""
    best: dict[int, Variant] = {}
    for variant in in_order(results):
        if variant.perplexity is not None and variant.bits is not None:
            best.setdefault(variant.bits, variant)
    return list(best.values())


def methods_of(results: Results) -> list[str]:
    """Return every method once, in the order of the results; its index selects its colour and shape."""
    return list(dict.fromkeys(variant.method for variant in results.variants))


def headline(results: Results) -> str:
    """Return one sentence: the lowest bits that stay close to the float model, and their cost."""
    reference = results.float
    measured = [variant for variant in in_order(results) if variant.perplexity is not None]
    if not measured:
        return "No variant has been measured yet." if results.variants else "There are no variants."
    if reference is None:
        return f"{formatting.plural(len(measured), 'variant')} measured, the float model not."

    def ratio(variant: Variant) -> float:
        return (variant.perplexity or 0.0) / reference.perplexity

    close = [variant for variant in best_of_bits(results) if ratio(variant) <= CLOSE]
    if not close:
        nearest = min(measured, key=ratio)
        values = _against_float(nearest, reference)
        return f"No variant stays close to the float model; {label(nearest)} is nearest: {values}"
    lowest = close[-1]
    bits = formatting.plural(lowest.bits or 0, "bit")
    return f"Down to {bits}, {lowest.method} stays close to the float model: {_against_float(lowest, reference)}"


def _against_float(variant: Variant, reference: FloatModel) -> str:
    change = formatting.change(variant.perplexity, reference.perplexity)
    return (
        f"perplexity {formatting.number(variant.perplexity)} against {formatting.number(reference.perplexity)} "
        f"({change}), at {formatting.number(variant.bits_per_weight, 3)} bits per weight and "
        f"{formatting.size(variant.size_bytes)} instead of {formatting.size(reference.size_bytes)}."
    )


def comparison_table(rows: Sequence[dict[str, Any]], caption: str = "") -> Table:
    """Return a terminal table with one row per model.

    Args:
        rows: `name`, and any of the measures that `evaluate` and `quantize` return; missing ones are dashes.
            Rows whose `best` is true are marked.
        caption: text under the table.
    """
    table = Table(
        caption=terminal_text(caption) if caption else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    columns = [key for key in _COLUMNS if key not in _OPTIONAL or any(row.get(key) for row in rows)]
    for key in columns:
        table.add_column(_TITLES[key], justify="right")
    for row in rows:
        cells = [_COLUMNS[key](row[key]) if row.get(key) is not None else "-" for key in columns]
        best = bool(row.get("best"))
        table.add_row(terminal_text(str(row["name"]) + " *" * best), *cells, style="bold" if best else None)
    return table


def _worst(row: dict[str, Any]) -> str | None:
    """Return the largest divergence by domain with the domain; None without domains."""
    worst = worst_domain(row)
    return None if worst is None else f"{row['domains'][worst]['kl_divergence']:.4f} {worst}"


def results_table(results: Results) -> Table:
    """Return the terminal table of a comparison, the float model first, the best of each bits marked."""
    best = {variant.name for variant in best_of_bits(results)}
    rows = [] if results.float is None else [{"name": "float", **results.float.model_dump()}]
    for variant in in_order(results):
        if variant.status == "done":
            row = {**variant.model_dump(), "time_s": variant.quantize_time_s, "best": variant.name in best}
            rows.append({**row, "worst_domain": _worst(row)})
    text = results.settings.evaluation
    caption = f"{results.settings.model}, {text.windows} held-out windows of {text.seqlen} tokens"
    return comparison_table(rows, f"{caption}; * lowest perplexity at these bits")


def results_by_task(results: Results) -> tuple[list[str], list[tuple[Variant | None, list[str]]]]:
    """Return titles of the metrics of every task, and a row of them for the float model (None) and every variant.

    Both are empty where no task was measured.
    """
    measured = [(None, results.float.tasks)] if results.float else []
    rows = [*measured, *((variant, variant.tasks) for variant in in_order(results))]
    rows = [(variant, tasks) for variant, tasks in rows if tasks]
    titles, cells = tasks_of_models([tasks for _, tasks in rows])
    return titles, [(variant, row) for (variant, _), row in zip(rows, cells, strict=True)]
