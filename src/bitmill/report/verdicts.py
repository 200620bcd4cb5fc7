"""The verdicts of a sweep: one word for each cell, and summary sentences, from plain results.

safe    a KL divergence from the float model of up to 0.05 nats per token
fair    up to 0.3
poor    up to 1.2; calibration repairs much of it
broken  above

Without text the weight errors replace the divergence, which on the demo model is about 45 times the mean relative
squared error where that is small. A layer far worse than the mean lowers the verdict by its own error.
docs/sweep.md has the measurements, and the perplexity that each verdict corresponds to.
"""

from __future__ import annotations

from typing import Any

# verdict, largest KL divergence (nats per token), least SQNR of the mean layer (dB)
LIMITS = (("safe", 0.05, 29.0), ("fair", 0.3, 22.0), ("poor", 1.2, 14.0))
BROKEN = "broken"
VERDICTS = (*(verdict for verdict, *_ in LIMITS), BROKEN)
MARGIN_DB = 10.0  # by which the worst layer may be below the limit of the mean layer


def verdict(cell: dict[str, Any]) -> str:
    """Return one of VERDICTS, by the KL divergence where it was measured, by the weight errors otherwise.

    Args:
        cell: kl_divergence (nats per token, or None), sqnr_db and worst_sqnr_db.
    """
    for name, max_kl, min_sqnr in LIMITS:
        if cell["kl_divergence"] is not None:
            if cell["kl_divergence"] <= max_kl:
                return name
        elif cell["sqnr_db"] >= min_sqnr and cell["worst_sqnr_db"] >= min_sqnr - MARGIN_DB:
            return name
    return BROKEN


def summarize(cells: list[dict[str, Any]]) -> list[str]:
    """Return one line per number of bits or named format, then the smallest cells that are safe, and fair."""
    lines = []
    for bits in sorted({cell["bits"] for cell in cells if _is_grid(cell)}, reverse=True):
        row = [cell for cell in cells if _is_grid(cell) and cell["bits"] == bits]
        groups = ((name, [c["group_size"] for c in row if c["verdict"] == name]) for name in VERDICTS)
        lines.append(
            f"{bits} bits: {'; '.join(f'{name} {_join_sizes(sizes)}' for name, sizes in groups if sizes)}"
        )
    lines += [f"{_cell_name(cell)}: {cell['verdict']}" for cell in cells if not _is_grid(cell)]
    for count, name in enumerate(VERDICTS[:2], start=1):
        good = [cell for cell in cells if cell["verdict"] in VERDICTS[:count]]
        best = min(good, key=lambda cell: (cell["bits_per_weight"], -cell["sqnr_db"]), default=None)
        smallest = (
            f"{_cell_name(best)}, {best['bits_per_weight']:.2f} bits per weight" if best else "none of these"
        )
        lines.append(f"smallest {name}: {smallest}")
    return lines


def _is_grid(cell: dict[str, Any]) -> bool:
    """Return True if the cell is a uniform grid, which the sweep rounds at several bits and group sizes."""
    return bool(cell["method"] == "rtn")


def _cell_name(cell: dict[str, Any]) -> str:
    """Return `4 bits in groups of 64` or `nf4 per row`."""
    name = f"{cell['bits']} bits" if _is_grid(cell) else cell["method"]
    return f"{name} {_join_sizes([cell['group_size']])}"


def _join_sizes(sizes: list[int | str]) -> str:
    """Return `per row and in groups of 128, 64 and 32`."""
    parts = [f"per {size}" for size in sizes if isinstance(size, str)]
    numbers = [str(size) for size in sizes if not isinstance(size, str)]
    if numbers:
        parts.append(f"in groups of {_join(numbers)}")
    return _join(parts)


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
