"""What can be read off the results of a comparison: an order, the best, a headline, what the charts draw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bitmill.report import numbers
from bitmill.report.palette import SHAPES, mark_of
from bitmill.report.results import Layer, Results, Variant

CLOSE = 1.25  # perplexity over the float model's that still counts as close, for the headline
_BLOCK = re.compile(r"\.(\d+)\.")


def label(variant: Variant) -> str:
    """What people read: `gptq 3-bit`, or the recipe's own name."""
    bits = f"-{variant.bits}bit"
    if not variant.name.endswith(bits):
        return variant.name
    return variant.method if variant.method.endswith(bits) else f"{variant.method} {variant.bits}-bit"


def in_order(results: Results) -> list[Variant]:
    """The most bits first, within them the lowest perplexity; what has none comes last."""

    def place(variant: Variant) -> tuple[bool, int, float, str]:
        measured = variant.perplexity
        return measured is None, -(variant.bits or 0), measured or 0.0, variant.name

    return sorted(results.variants, key=place)


def best_of_bits(results: Results) -> list[Variant]:
    """For every number of bits the variant of lowest perplexity, the most bits first."""
    best: dict[int, Variant] = {}
    for variant in in_order(results):
        if variant.perplexity is not None and variant.bits is not None:
            best.setdefault(variant.bits, variant)
    return list(best.values())


def methods_of(results: Results) -> list[str]:
    """Every method once, in the order of the results; a method's place decides its colour and shape."""
    return list(dict.fromkeys(variant.method for variant in results.variants))


def headline(results: Results) -> str:
    """The one thing to know: how low the bits can go, and what that costs."""
    best, reference = best_of_bits(results), results.float
    measured = [variant for variant in in_order(results) if variant.perplexity is not None]
    if not measured:
        return "No variant has been measured yet." if results.variants else "There are no variants."
    if reference is None:
        return f"{numbers.plural(len(measured), 'variant')} measured, the float model not."

    def ratio(variant: Variant) -> float:
        return (variant.perplexity or 0.0) / reference.perplexity

    close = [variant for variant in best if ratio(variant) <= CLOSE]
    chosen = close[-1] if close else min(measured, key=ratio)
    figures = (
        f"perplexity {numbers.number(chosen.perplexity)} against {numbers.number(reference.perplexity)} "
        f"({numbers.change(chosen.perplexity, reference.perplexity)}), at "
        f"{numbers.number(chosen.bits_per_weight, 3)} bits per weight and {numbers.size(chosen.size_bytes)} "
        f"instead of {numbers.size(reference.size_bytes)}."
    )
    if not close:
        return f"Nothing stays close to the float model; {label(chosen)} comes nearest: {figures}"
    lowest = numbers.plural(chosen.bits or 0, "bit")
    return f"Down to {lowest}, {chosen.method} stays close to the float model: {figures}"


@dataclass(frozen=True)
class LayerGrid:
    """Layers as a table: what they are called in a block (rows), the blocks (columns)."""

    rows: list[str]
    blocks: list[int]

    def values(self, layers: Iterable[Layer], key: str) -> list[list[float | None]]:
        """One measure of a variant's layers, None where there is no such layer or no such figure."""
        known = {split_name(layer.name): getattr(layer, key) for layer in layers}
        return [[known.get((block, row)) for block in self.blocks] for row in self.rows]


def split_name(name: str) -> tuple[int, str]:
    """(block, name inside it) of a layer; a layer outside of all blocks has block 0."""
    head, *rest = _BLOCK.split(name, maxsplit=1)
    return (int(rest[0]), rest[1]) if rest else (0, head)


def layer_grid(layers: Iterable[Layer]) -> LayerGrid:
    """The grid in which layers have their places, in the order in which they come."""
    places = [split_name(layer.name) for layer in layers]
    return LayerGrid(list(dict.fromkeys(row for _, row in places)), sorted({block for block, _ in places}))


def same_start(answer: str, reference: str) -> int:
    """How many characters of an answer are those of the float model's."""
    shorter = min(len(answer), len(reference))
    return next((i for i in range(shorter) if answer[i] != reference[i]), shorter)


def chart_data(results: Results) -> dict[str, Any]:
    """What the page's script draws from: numbers, and the words of the hover labels."""
    methods, measured = methods_of(results), [v for v in in_order(results) if v.status == "done"]
    grid = layer_grid(layer for variant in measured for layer in variant.layers)
    reference = results.float
    return {
        "float": reference and reference.model_dump(exclude={"samples"}),
        "methods": [_method(name, index) for index, name in enumerate(methods)],
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
                variant.name: {key: _measured(grid, variant, key) for key in ("output_error", "weight_error")}
                for variant in measured
            },
        },
    }


_CHARTED = ("name", "bits", "bits_per_weight", "size_bytes", "perplexity", "kl_divergence", "top1_agreement")


def hover(variant: Variant, reference: float | None) -> list[tuple[str, str]]:
    """Names and values of one variant's figures."""
    return [
        ("bits per weight", numbers.number(variant.bits_per_weight)),
        ("size", numbers.size(variant.size_bytes)),
        ("perplexity", f"{numbers.number(variant.perplexity)} ({numbers.change(variant.perplexity, reference)})"),
        ("KL divergence", f"{numbers.number(variant.kl_divergence, 3)} nats"),
        ("top-1 agreement", numbers.percent(variant.top1_agreement)),
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of dotted names, as many as tell them apart."""
    for parts in (1, 2):
        short = [".".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)


def _method(name: str, index: int) -> dict[str, Any]:
    mark = mark_of(index)
    return {"name": name, "colour": mark.colour, "symbol": SHAPES[mark.shape][0]}


def _measured(grid: LayerGrid, variant: Variant, key: str) -> list[list[float | None]] | None:
    """A table to four digits, for these are many and a colour shows no more; None where nothing is known."""
    table = [[None if v is None else float(f"{v:.4g}") for v in row] for row in grid.values(variant.layers, key)]
    return table if any(value is not None for row in table for value in row) else None
