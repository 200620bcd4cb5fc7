"""How many calibration tokens the experts of a mixture saw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def expert_coverage(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for every fused tensor: its name, its experts, and the tokens that were sent to them.

    Args:
        layers: summaries of layers, as in report.json.
    """
    sent: dict[str, list[int]] = {}
    for layer in layers:
        if isinstance(layer.get("tokens"), int):  # experts alone have them
            sent.setdefault(layer["name"].rpartition(".")[0], []).append(layer["tokens"])
    return [
        {
            "name": name,
            "experts": len(tokens),
            "least": min(tokens),
            "median": round(statistics.median(tokens)),
            "without": tokens.count(0),
        }
        for name, tokens in sent.items()
    ]
