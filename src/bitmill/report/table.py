"""Several models side by side, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from bitmill.report.results import Results
from bitmill.report.view import best_of_bits, in_order

_COLUMNS = {
    "perplexity": lambda v: f"{v:.3f}",
    "kl_divergence": lambda v: f"{v:.4f}",
    "top1_agreement": lambda v: f"{v:.1%}",
    "bits_per_weight": lambda v: f"{v:.3f}",
    "size_bytes": lambda v: f"{v / 1e6:.1f} MB",
    "time_s": lambda v: f"{v:.0f} s",
}
_TITLES = {  # short: the table is to fit 80 columns
    "perplexity": "ppl",
    "kl_divergence": "KL to float",
    "top1_agreement": "top-1",
    "bits_per_weight": "bits/w",
    "size_bytes": "on disk",
    "time_s": "made in",
}


def comparison_table(rows: Sequence[dict[str, Any]], caption: str = "") -> Table:
    """One row a model: `name`, and any of the measures that `evaluate` and `quantize` return; "-" for the rest.

    A row that is `best` is marked.
    """
    table = Table(caption=caption or None, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for key in _COLUMNS:
        table.add_column(_TITLES[key], justify="right")
    for row in rows:
        cells = [_COLUMNS[key](row[key]) if row.get(key) is not None else "-" for key in _COLUMNS]
        best = bool(row.get("best"))
        table.add_row(escape(str(row["name"])) + " *" * best, *cells, style="bold" if best else None)
    return table


def results_table(results: Results) -> Table:
    """A comparison: the float model, then by falling bits and rising perplexity, the best of each bits marked."""
    best = {variant.name for variant in best_of_bits(results)}
    rows = [] if results.float is None else [{"name": "float", **results.float.model_dump()}]
    for variant in in_order(results):
        if variant.status == "done":
            row = {**variant.model_dump(), "time_s": variant.quantize_time_s, "best": variant.name in best}
            rows.append(row)
    text = results.settings.evaluation
    caption = f"{results.settings.model}, {text.windows} held-out windows of {text.seqlen} tokens"
    return comparison_table(rows, f"{caption}; * lowest perplexity at these bits")
