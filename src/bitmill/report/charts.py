"""The data of the charts on the pages: colours and markers of methods, layers by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bitmill.report import formatting
from bitmill.report.comparison import in_order, label, methods_of
from bitmill.report.results import Layer, Results, Variant

# Eight colours for each theme, distinguishable with any of the three dichromacies (tests/report/test_palette.py
# simulates them), at a contrast of 3:1 or more to the background; and eight shapes, so that colour is never the
# only difference. The ninth method has the first colour again, with another shape.
LIGHT = ("#0072b2", "#d55e00", "#7f9156", "#6b4018", "#ce7c96", "#ac5cf5", "#4420c8", "#8b0561")
DARK = ("#56b4e9", "#ff8f50", "#548d5e", "#f2dc4a", "#c9efa6", "#aa62f8", "#58f0c8", "#f0339f")
LIGHT_PANEL, DARK_PANEL = "#ffffff", "#1b1e24"

# name in plotly, and path in a box of 16 x 16
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
_CHARTED = ("name", "bits", "bits_per_weight", "size_bytes", "perplexity", "kl_divergence", "top1_agreement")
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Marker:
    """The marker of a method: indices of its colour and of its shape."""

    colour: int
    shape: int


def marker_of(index: int) -> Marker:
    """Return the marker of the `index`-th method; the first 64 differ."""
    rounds = index // len(LIGHT)
    return Marker(index % len(LIGHT), (index + 3 * rounds) % len(SHAPES))


@dataclass(frozen=True)
class LayerGrid:
    """Layers as a table.

    Attributes:
        rows: names of the layers inside a block.
        blocks: numbers of the blocks, the columns.
    """

    rows: list[str]
    blocks: list[int]

    def values(self, layers: Iterable[Layer], key: str) -> list[list[float | None]]:
        """Return one attribute of the layers as a table.

        Args:
            layers: quantized layers.
            key: name of the attribute.

        Returns:
            Values by (row, block); None where a layer or its value is missing.
        """
        by_place = {split_name(layer.name): getattr(layer, key) for layer in layers}
        return [[by_place.get((block, row)) for block in self.blocks] for row in self.rows]


def split_name(name: str) -> tuple[int, str]:
    """Return (block, name inside it) of a layer; layers outside of all blocks have block 0."""
    head, *rest = _BLOCK.split(name, maxsplit=1)
    return (int(rest[0]), rest[1]) if rest else (0, head)


def layer_grid(layers: Iterable[Layer]) -> LayerGrid:
    """Return the grid of the layers, rows in order of appearance."""
    places = [split_name(layer.name) for layer in layers]
    return LayerGrid(list(dict.fromkeys(row for _, row in places)), sorted({block for block, _ in places}))


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of dotted names, as few as keep them distinct."""
    for parts in (1, 2):
        short = [".".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)


def chart_data(results: Results) -> dict[str, Any]:
    """Return the plain data that the script of the comparison page draws: numbers and hover texts."""
    methods, measured = methods_of(results), [v for v in in_order(results) if v.status == "done"]
    grid = layer_grid(layer for variant in measured for layer in variant.layers)
    reference = results.float
    return {
        "float": reference and reference.model_dump(exclude={"samples"}),
        "gaussian_divergence": gaussian_divergence(measured),
        "methods": [_method_entry(name, index) for index, name in enumerate(methods)],
        "variants": [
            {
                **variant.model_dump(include=set(_CHARTED)),
                "method": methods.index(variant.method),
                "label": label(variant),
                "hover": hover(variant, None if reference is None else reference.perplexity),
            }
            for variant in measured
        ],
        "layers": {
            "rows": short_names(grid.rows),
            "names": grid.rows,
            "blocks": grid.blocks,
            "values": {
                variant.name: {
                    key: _rounded_values(grid, variant, key) for key in ("output_error", "weight_error")
                }
                for variant in measured
            },
        },
    }


def gaussian_divergence(variants: Iterable[Variant]) -> float | None:
    """Return the divergence at 0 bits, c, of the curve c * 2^(-2 bits); None where no errors of weights are known.

    No code of R bits a weight stores a Gaussian source with a relative squared error below 2^(-2 R). The
    divergence per relative squared error of the weights is the least of all variants.
    """
    ratios = []
    for variant in variants:
        known = [layer for layer in variant.layers if layer.weight_error is not None]
        sizes = [math.prod(layer.shape) for layer in known]
        weighted = sum(size * (layer.weight_error or 0.0) for size, layer in zip(sizes, known))
        if weighted > 0 and variant.kl_divergence is not None and variant.kl_divergence > 0:
            ratios.append(variant.kl_divergence * sum(sizes) / weighted)
    return min(ratios, default=None)


def hover(variant: Variant, reference: float | None) -> list[tuple[str, str]]:
    """Return (name, value) of the metrics of one variant.

    Args:
        variant: a measured variant.
        reference: perplexity of the float model.
    """
    change = formatting.change(variant.perplexity, reference)
    return [
        ("bits per weight", formatting.number(variant.bits_per_weight)),
        ("size", formatting.size(variant.size_bytes)),
        ("perplexity", f"{formatting.number(variant.perplexity)} ({change})"),
        ("KL divergence", f"{formatting.number(variant.kl_divergence, 3)} nats"),
        ("top-1 agreement", formatting.percent(variant.top1_agreement)),
    ]


def _method_entry(name: str, index: int) -> dict[str, Any]:
    marker = marker_of(index)
    return {"name": name, "colour": marker.colour, "symbol": SHAPES[marker.shape][0]}


def _rounded_values(grid: LayerGrid, variant: Variant, key: str) -> list[list[float | None]] | None:
    """Return a measure of all layers to four digits, all that a colour shows; None without any value."""
    table = [[None if v is None else float(f"{v:.4g}") for v in row] for row in grid.values(variant.layers, key)]
    return table if any(value is not None for row in table for value in row) else None


def log_ticks(low: float, high: float) -> Sequence[float]:
    """Return round numbers in a range: powers of ten, with 2 and 5 times these where they are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high]
        if len(found) >= 3:
            break
    return found
