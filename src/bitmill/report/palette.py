"""Colours and marks of methods, the same in every chart.

Eight colours for each theme, told apart by people with any of the three dichromacies (tests/report/test_palette.py
simulates them), at 3:1 or more against the background; and eight shapes, so that colour is never alone. The
ninth method has the first colour again, with another shape.
"""

from __future__ import annotations

from dataclasses import dataclass

LIGHT = ("#0072b2", "#d55e00", "#7f9156", "#6b4018", "#ce7c96", "#ac5cf5", "#4420c8", "#8b0561")
DARK = ("#56b4e9", "#ff8f50", "#548d5e", "#f2dc4a", "#c9efa6", "#aa62f8", "#58f0c8", "#f0339f")
LIGHT_PANEL, DARK_PANEL = "#ffffff", "#1b1e24"

# as plotly calls them, and as a path in a box of 16 x 16
SHAPES = (
    ("circle", "M8 2.2a5.8 5.8 0 1 0 0 11.6a5.8 5.8 0 1 0 0-11.6z"),
    ("square", "M3 3h10v10H3z"),
    ("diamond", "M8 1l7 7-7 7-7-7z"),
    ("triangle-up", "M8 1.8l7 12.2H1z"),
    ("cross", "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"),
    ("triangle-down", "M8 14.2L1 2h14z"),
    ("hexagon", "M8 1l6.1 3.5v7L8 15l-6.1-3.5v-7z"),
    ("star", "M8 .8l2.1 4.9 5.3.5-4 3.5 1.2 5.2L8 12.1l-4.6 2.8 1.2-5.2-4-3.5 5.3-.5z"),
)


@dataclass(frozen=True)
class Mark:
    """How a method is drawn: indices of its colour and of its shape."""

    colour: int
    shape: int


def mark_of(index: int) -> Mark:
    """The mark of the `index`-th method; the first 64 differ."""
    rounds = index // len(LIGHT)
    return Mark(index % len(LIGHT), (index + 3 * rounds) % len(SHAPES))
