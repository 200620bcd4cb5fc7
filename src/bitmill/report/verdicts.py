"""What the cells of a study mean, in words: plain results in, sentences out.

safe    a KL divergence from the float model of up to 0.05 nats a token
fair    up to 0.3
poor    up to 1.2; calibration repairs much of it
broken  beyond

Without text the errors of the weights stand in for the divergence, which on the demo model is about 45 times
the mean relative squared error where that is small. A layer far worse than the mean counts by its own error.
docs/study.md has the measurements, and what the words come to in perplexity.
"""

from __future__ import annotations

from typing import Any

# word, largest KL divergence (nats a token), least SQNR of the mean layer (dB)
LIMITS = (("safe", 0.05, 29.0), ("fair", 0.3, 22.0), ("poor", 1.2, 14.0))
BROKEN = "broken"
WORDS = (*(word for word, *_ in LIMITS), BROKEN)
MARGIN_DB = 10.0  # by which the worst layer may lie below the limit


def verdict(cell: dict[str, Any]) -> str:
    """One of WORDS, by the KL divergence where it was measured, by the errors of the weights otherwise."""
    for word, most, least in LIMITS:
        if cell["kl_divergence"] is not None:
            if cell["kl_divergence"] <= most:
                return word
        elif cell["sqnr_db"] >= least and cell["worst_sqnr_db"] >= least - MARGIN_DB:
            return word
    return BROKEN


def verdicts(cells: list[dict[str, Any]]) -> list[str]:
    """One line a number of bits or a named format, and the smallest that is safe, and fair."""
    lines = []
    for bits in sorted({cell["bits"] for cell in cells if _is_grid(cell)}, reverse=True):
        row = [cell for cell in cells if _is_grid(cell) and cell["bits"] == bits]
        said = ((word, [c["group_size"] for c in row if c["verdict"] == word]) for word in WORDS)
        lines.append(f"{bits} bits: {'; '.join(f'{word} {_joined(sizes)}' for word, sizes in said if sizes)}")
    lines += [f"{_spelled(cell)}: {cell['verdict']}" for cell in cells if not _is_grid(cell)]
    for count, word in enumerate(WORDS[:2], start=1):
        enough = [cell for cell in cells if cell["verdict"] in WORDS[:count]]
        best = min(enough, key=lambda cell: (cell["bits_per_weight"], -cell["sqnr_db"]), default=None)
        found = f"{_spelled(best)}, {best['bits_per_weight']:.2f} bits per weight" if best else "nothing here"
        lines.append(f"smallest {word}: {found}")
    return lines


def _is_grid(cell: dict[str, Any]) -> bool:
    return bool(cell["method"] == "rtn")


def _spelled(cell: dict[str, Any]) -> str:
    """`4 bits in groups of 64`, `nf4 per row`."""
    what = f"{cell['bits']} bits" if _is_grid(cell) else cell["method"]
    return f"{what} {_joined([cell['group_size']])}"


def _joined(sizes: list[int | str]) -> str:
    """`per row and in groups of 128, 64 and 32`."""
    parts = [f"per {size}" for size in sizes if isinstance(size, str)]
    numbers = [str(size) for size in sizes if not isinstance(size, str)]
    if numbers:
        parts.append(f"in groups of {_listed(numbers)}")
    return _listed(parts)


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
