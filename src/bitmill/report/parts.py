"""The parts of a quantized folder, from its report: the blocks' layers, embedding and head, what is in float."""

from __future__ import annotations

import math
from typing import Any

from bitmill.report import numbers
from bitmill.report.words import spelled

Report = dict[str, Any]


def split_layers(report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The quantized layers of the blocks, and those at the model's ends, embedding and head."""
    ends = report.get("ends") or {}
    outside = (ends.get("embedding"), ends.get("head"))
    layers = report["layers"]
    return [v for v in layers if v["name"] not in outside], [v for v in layers if v["name"] in outside]


def bytes_inside(report: Report) -> int:
    """What the quantized layers of the blocks take, in bytes, with what they share."""
    layers, _ = split_layers(report)
    if any("shared" in layer for layer in layers):  # which no layer counts as its own, but the model's bits do
        return round(report["bits_per_weight"] * sum(math.prod(layer["shape"]) for layer in layers) / 8)
    return sum(layer["size_bytes"] for layer in layers)


def sizes(report: Report) -> list[tuple[str, int]]:
    """What the tensors of each part take, in bytes; empty where an earlier version wrote the report."""
    if report.get("unquantized_bytes") is None:
        return []
    outside = sum(layer["size_bytes"] for layer in split_layers(report)[1])
    parts = [("in the blocks' linear layers", bytes_inside(report)), (f"in {_ends_named(report)}", outside)]
    return [part for part in parts if part[1]] + [("in float", report["unquantized_bytes"])]


def ends_said(report: Report) -> str:
    """How embedding and head are stored, in a sentence."""
    ends = report.get("ends")
    if not ends:
        return "Embeddings, norms and the head are as in the source."
    named = _ends_named(report)
    bits = f"{report['head_bits_per_weight']:.3f} bits per weight"
    once = ", one matrix for both" if ends["tied"] else ""
    return (
        f"{named.capitalize()} are stored packed too, in {spelled(report['recipe']['head'])}, {bits}{once}; "
        "all else outside the blocks is as in the source."
    )


def sizes_said(report: Report) -> str:
    """What each part takes, in a sentence; empty where that is not known."""
    known = sizes(report)
    if not known:
        return ""
    listed = ", ".join(f"{numbers.size(size)} {name}" for name, size in known)
    total = numbers.size(sum(size for _, size in known))
    return f"The tensors take {total}: {listed}.".replace(numbers.GAP, " ")


def _ends_named(report: Report) -> str:
    ends = report.get("ends") or {}
    return "token embeddings and head" if ends.get("head") else "token embeddings"
