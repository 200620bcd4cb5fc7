"""The errors of all layers as a picture of coloured squares, in a few kilobytes of SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitmill.report import numbers
from bitmill.report.results import Layer
from bitmill.report.view import layer_grid, short_names

STEPS = 20  # of the colour scale, between 5 colours
_PITCH, _SIDE, _LETTER = 30, 28, 7.5


@dataclass(frozen=True)
class HeatMap:
    """Where everything stands, in pixels: (x, y, text), squares (x, y, step of the scale, text)."""

    width: int
    height: int
    rows: list[tuple[int, int, str]]
    columns: list[tuple[int, int, str]]
    cells: list[tuple[int, int, int, str]]
    scale: list[tuple[int, int, int]]
    ends: list[tuple[int, int, str]]
    side: int = _SIDE


def heat_map(layers: Sequence[Layer], key: str) -> HeatMap | None:
    """One measure of all layers, linears by blocks, on a logarithmic scale; None where nothing is known."""
    known = [value for layer in layers if (value := getattr(layer, key)) is not None and value > 0]
    if not known:
        return None
    known.sort()
    low, high = known[len(known) // 50], known[-1]  # a few layers without error must not pale all the others
    span = math.log(high / low) or 1.0
    grid = layer_grid(layers)
    names = short_names(grid.rows)
    left = round(12 + _LETTER * max(len(name) for name in names))
    bottom = _PITCH * len(names)
    every = 1 if len(grid.blocks) < 12 else 2 if len(grid.blocks) < 45 else 5
    cells = []
    for row, (name, values) in enumerate(zip(grid.rows, grid.values(layers, key), strict=True)):
        for column, (block, value) in enumerate(zip(grid.blocks, values, strict=True)):
            if value is not None:
                step = round(STEPS * max(0.0, math.log(value / low) / span)) if value > 0 else 0
                what = f"block {block}, {name}: {numbers.number(value, 3)}"
                cells.append((left + _PITCH * column + 1, _PITCH * row + 1, step, what))
    return HeatMap(
        width=left + _PITCH * max(len(grid.blocks), 8) + 2,
        height=bottom + 60,
        rows=[(left - 8, _PITCH * row + 19, name) for row, name in enumerate(names)],
        columns=[
            (left + _PITCH * column + 15, bottom + 17, str(block))
            for column, block in enumerate(grid.blocks)
            if column % every == 0
        ],
        cells=cells,
        scale=[(left + 6 * step, bottom + 30, step) for step in range(STEPS + 1)],
        ends=[
            (left, bottom + 56, ("≤" if known[0] < low else "") + numbers.number(low, 2)),
            (left + 6 * STEPS - 14, bottom + 56, numbers.number(high, 2)),
        ],
    )
