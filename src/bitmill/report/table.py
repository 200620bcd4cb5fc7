"""Several models side by side, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

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
    """One row a model: `name`, and any of the measures that `evaluate` and `quantize` return; "-" for the rest."""
    table = Table(caption=caption or None, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for key in _COLUMNS:
        table.add_column(_TITLES[key], justify="right")
    for row in rows:
        cells = [_COLUMNS[key](row[key]) if row.get(key) is not None else "-" for key in _COLUMNS]
        table.add_row(str(row["name"]), *cells)
    return table
