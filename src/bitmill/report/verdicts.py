"""The verdicts of a sweep: one word for each cell, and summary sentences, from plain results.

safe    a KL divergence from the float model of up to 0.05 nats per token
fair    up to 0.3
poor    up to 1.2; calibration repairs much of it
broken  above

Without text the errors of layers replace the divergence, which on the demo model is about 45 times the mean
relative squared error where that is small, and 24 times where inputs are rounded. A layer far worse than the mean
lowers the verdict by its own error. docs/sweep.md has the measurements, and the perplexity that each
verdict corresponds to.
"""

from __future__ import annotations

from typing import Any

# verdict, largest KL divergence (nats per token), least SQNR of the mean layer (dB): of its weights, or of its
# outputs where inputs are rounded
LIMITS = {
    "weight": (("safe", 0.05, 29.0), ("fair", 0.3, 22.0), ("poor", 1.2, 14.0)),
    "input": (("safe", 0.05, 26.0), ("fair", 0.3, 19.0), ("poor", 1.2, 14.0)),
}
BROKEN = "broken"
VERDICTS = (*(verdict for verdict, *_ in LIMITS["weight"]), BROKEN)
MARGIN_DB = 10.0  # by which the worst layer may be below the limit of the mean layer


def verdict(cell: dict[str, Any], of: str = "weight") -> str:
    """Return one of VERDICTS, by the KL divergence where it was measured, by the errors otherwise.

    Args:
        cell: kl_divergence (nats per token, or None), sqnr_db and worst_sqnr_db.
        of: "weight" or "input", the numbers that are rounded.
    """
    for name, max_kl, min_sqnr in LIMITS[of]:
        if cell["kl_divergence"] is not None:
            if cell["kl_divergence"] <= max_kl:
                return name
        elif cell["sqnr_db"] >= min_sqnr and cell["worst_sqnr_db"] >= min_sqnr - MARGIN_DB:
            return name
    return BROKEN


def summarize(cells: list[dict[str, Any]], of: str = "weight") -> list[str]:
    """Return one line per row of the table, then the smallest cells that are safe, and fair.

    Args:
        cells: by rows, each with a `verdict`, its `name` and `group_size`.
        of: "weight" or "input", the numbers that are rounded.
    """
    lines = []
    for name, row in _rows(cells).items():
        if len(row) == 1:
            lines.append(f"{_cell_name(row[0], of)}: {row[0]['verdict']}")
            continue
        groups = ((word, [c["group_size"] for c in row if c["verdict"] == word]) for word in VERDICTS)
        lines.append(f"{name}: {'; '.join(f'{word} {_join_sizes(sizes, of)}' for word, sizes in groups if sizes)}")
    key = f"bits_per_{of}"
    for count, word in enumerate(VERDICTS[:2], start=1):
        good = [cell for cell in cells if cell["verdict"] in VERDICTS[:count]]
        best = min(good, key=lambda cell: (cell[key], -cell["sqnr_db"]), default=None)
        smallest = f"{_cell_name(best, of)}, {best[key]:.2f} bits per {of}" if best else "none of these"
        lines.append(f"smallest {word}: {smallest}")
    return lines


def _rows(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return name of a row -> its cells, in the order of the cells."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(cell["name"], []).append(cell)
    return rows


def _cell_name(cell: dict[str, Any], of: str) -> str:
    """Return `4 bits in groups of 64` or `nf4 per row`."""
    return f"{cell['name']} {_join_sizes([cell['group_size']], of)}"


def _join_sizes(sizes: list[int | str], of: str) -> str:
    """Return `per row and in groups of 128, 64 and 32`; a row of inputs is a token."""
    parts = [f"per {size_name(size, of)}" for size in sizes if isinstance(size, str)]
    numbers = [str(size) for size in sizes if not isinstance(size, str)]
    if numbers:
        parts.append(f"in groups of {_join(numbers)}")
    return _join(parts)


def size_name(size: int | str, of: str) -> str:
    """Return a group size in words.

    Args:
        size: columns in a group, "row" or "tensor".
        of: "weight" or "input", the numbers in groups.
    """
    return "token" if size == "row" and of == "input" else str(size)


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
