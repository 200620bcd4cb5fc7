"""What a model takes: as planned, on the disk, in memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitmill.checkpoint.files import folder_bytes
from bitmill.checkpoint.reader import Checkpoint, is_ours, open_checkpoint
from bitmill.errors import UsageError
from bitmill.formats import Format
from bitmill.formats.base import total_stored_bits
from bitmill.models.embedding_and_head import embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.recipe import Recipe
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.sources.open import open_source

_Layer = tuple[Format, tuple[int, int], Hashable]  # and by what those that share parts know each other


def storage_plan(streamed: StreamedModel, recipe: Recipe | None, kv_bytes: int = 0) -> dict[str, Any]:
    """What would be stored: layers, bits, bytes; without a recipe the weights as they are.

    kv_bytes: of what keys and values are calibrated to, which count too.
    `bits_per_weight` counts the linears of the blocks; embedding and head have `head_bits_per_weight` (None in
    float) and `head_bytes` (0 in float).

    Raises UsageError when nothing would be quantized and for ignored names that make no sense, SourceError when
    embedding and head are to be quantized and cannot be.
    """
    if recipe is None:
        return _float_plan(streamed, kv_bytes)
    _check_ignored(streamed, recipe)
    adapter = streamed.adapter
    packed: set[str] = set()
    layers: list[_Layer] = []
    for index in range(len(streamed.blocks)):
        for linear in adapter.linears:
            name = f"{streamed.block_name(index)}.{linear}"
            if recipe.ignores(name):
                continue
            rows, columns = streamed.shape(f"{name}.weight")
            layers.append((recipe.stored, (columns, rows) if adapter.transposed else (rows, columns), linear))
            packed.add(f"{name}.weight")
    if not layers:
        raise UsageError(f"The recipe {recipe.name!r} ignores every linear layer, so nothing would be quantized.")
    bits, weights = _stored(layers)
    head_bits = head_weights = 0
    if recipe.head is not None:
        ends, format = embedding_and_head(streamed), recipe.head
        if ignored := next((path for path in (ends.embedding, ends.head) if path and recipe.ignores(path)), None):
            raise UsageError(
                f"The recipe {recipe.name!r} ignores {ignored!r}, and embedding and head are to be quantized; "
                "leave out one of the two."
            )
        outside = [(layer, streamed.shape(ends.stored_name(layer, streamed))) for layer in ends.layers]
        head_bits, head_weights = _stored((format, (rows, columns), name) for name, (rows, columns) in outside)
        packed.update(ends.weights)
    rest = sum(
        torch.Size(streamed.shape(n)).numel() * streamed.dtype(n).itemsize
        for n in streamed.names()
        if n not in packed
    )
    return {
        "method": recipe.name,
        "format": recipe.stored.to_dict(),
        "layers": len(layers),
        "quantized_weights": weights,
        "bits_per_weight": (bits + 8 * kv_bytes) / weights,
        "size_bytes": (bits + head_bits) // 8 + rest + kv_bytes,
        "head_bits_per_weight": head_bits / head_weights if head_weights else None,
        "head_bytes": head_bits // 8,
        "unquantized_bytes": rest,
    }


def _float_plan(streamed: StreamedModel, kv_bytes: int) -> dict[str, Any]:
    shapes = {name: torch.Size(streamed.shape(name)).numel() for name in streamed.names()}
    size = sum(count * streamed.dtype(name).itemsize for name, count in shapes.items())
    return {
        "method": "none",
        "format": None,
        "layers": 0,
        "quantized_weights": 0,
        "bits_per_weight": 8 * (size + kv_bytes) / max(sum(shapes.values()), 1),
        "size_bytes": size + kv_bytes,
        "head_bits_per_weight": None,
        "head_bytes": 0,
        "unquantized_bytes": size,
    }


def report_plan(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same of a folder that is there, but for what quantizing alone knows."""
    recipe, report = checkpoint.report.get("recipe"), checkpoint.report
    inside = [name for name in checkpoint.formats if name not in checkpoint.outside]
    return {
        "method": recipe["name"] if recipe else "none",
        "format": checkpoint.formats[inside[0]].to_dict() if inside else None,
        "layers": len(inside),
        "quantized_weights": sum(math.prod(checkpoint.shape(name)) for name in inside),
        **{key: report.get(key) for key in ("bits_per_weight", "head_bits_per_weight", "head_bytes")},
        "unquantized_bytes": report.get("unquantized_bytes"),
    }


def _check_ignored(streamed: StreamedModel, recipe: Recipe) -> None:
    """Raises UsageError for a pattern that no matrix answers to: what it was to spare would be quantized."""
    named = streamed.model.named_parameters(remove_duplicate=False)
    matrices = {name.removesuffix(".weight") for name, weight in named if weight.dim() == 2}
    for pattern in recipe.ignore:
        if not any(fnmatchcase(matrix, pattern) for matrix in matrices):
            first = f"{streamed.block_name(0)}.{streamed.adapter.linears[0]}"
            raise UsageError(
                f"No layer with a matrix of weights is called {pattern!r}, which the recipe {recipe.name!r} "
                f"ignores; patterns match whole names such as {first!r}, and * stands for any characters."
            )


def stored_bits(model: str | Path | nn.Module, trust_remote_code: bool) -> tuple[float, int]:
    """(bits a weight of the blocks' quantized layers or of the float weights, bytes on disk or in memory)."""
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        size = sum(t.nbytes for t in tensors)
        packed = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.outside]
        if packed:
            bits, weights = _stored((m.format, m.shape, id(m.shared or m)) for m in packed)
            return bits / weights, size
        return 8 * size / max(sum(t.numel() for t in tensors), 1), size
    if is_ours(Path(model)):
        return open_checkpoint(model).bits_per_weight, folder_bytes(Path(model))
    source = open_source(model, trust_remote_code=trust_remote_code)
    sizes = [(torch.Size(source.shape(n)).numel(), source.dtype(n).itemsize) for n in source.names()]
    total = sum(count * width for count, width in sizes)
    return 8 * total / max(sum(count for count, _ in sizes), 1), total


def _stored(layers: Iterable[_Layer]) -> tuple[int, int]:
    """(bits, weights) of all of them."""
    known = list(layers)
    return total_stored_bits(known), sum(math.prod(shape) for _, shape, _ in known)
