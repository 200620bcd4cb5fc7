"""Sizes of a model: planned, on disk, in memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitmill.checkpoint.reader import Checkpoint, is_bitmill_folder, open_checkpoint
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.files import folder_bytes
from bitmill.formats import Format
from bitmill.formats.quantized import total_stored_bits
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.sources.open import open_source

_Layer = tuple[Format, tuple[int, int], Hashable]  # and by what those that share parts know each other


def storage_plan(streamed: StreamedModel, resolved: ResolvedRecipe | None, kv_bytes: int = 0) -> dict[str, Any]:
    """Return the layers, bits and bytes that would be stored, as plain data.

    Args:
        streamed: the model; no weight is read.
        resolved: the recipe on this model; None leaves the weights as they are.
        kv_bytes: size of a calibration of keys and values, which counts too.

    Returns:
        `bits_per_weight` counts the linears of the blocks; embedding and head have `head_bits_per_weight` (None in
        float) and `head_bytes` (0 in float). `format` is that of most weights, `formats` are all of them.
    """
    if resolved is None:
        return _float_plan(streamed, kv_bytes)
    inside: list[_Layer] = []
    packed: set[str] = set()
    for index in range(len(streamed.blocks)):
        prefix = f"{streamed.block_name(index)}."
        for site in streamed.sites(index):
            if (format := resolved.formats.get(site.layer)) is not None:
                inside.append((format, (site.shape[0], site.shape[1]), site.layer.removeprefix(prefix)))
                packed.add(site.path)
    bits, weights = _stored(inside)
    head_bits = head_weights = 0
    if ends := resolved.ends:
        outside = [(layer, ends.shape(layer, streamed)) for layer in resolved.head_layers]
        head_bits, head_weights = _stored(
            (resolved.formats[name], (rows, columns), name) for name, (rows, columns) in outside
        )
        packed.update(ends.weights)
    rest = sum(
        torch.Size(streamed.shape(n)).numel() * streamed.dtype(n).itemsize
        for n in streamed.names()
        if n not in packed
    )
    formats, size, original = _formats(inside), (bits + head_bits) // 8 + rest + kv_bytes, float_bytes(streamed)
    return {
        "method": resolved.recipe.name,
        "format": max(formats, key=lambda entry: entry["weights"])["format"],
        "formats": formats,
        "attention": resolved.recipe.attention and resolved.recipe.attention.to_dict(),
        "layers": len(inside),
        "quantized_weights": weights,
        "bits_per_weight": (bits + 8 * kv_bytes) / weights,
        "size_bytes": size,
        "original_bytes": original,
        "size_ratio": size / original,
        "head_bits_per_weight": head_bits / head_weights if head_weights else None,
        "head_bytes": head_bits // 8,
        "head_note": resolved.note,
        "unquantized_bytes": rest,
    }


def float_bytes(streamed: StreamedModel) -> int:
    """Return the bytes of all tensors of a model, in the types that its source gives."""
    return sum(
        torch.Size(streamed.shape(name)).numel() * streamed.dtype(name).itemsize for name in streamed.names()
    )


def _formats(layers: Iterable[_Layer]) -> list[dict[str, Any]]:
    """Return every distinct format with the number of layers and weights that have it."""
    entries: dict[Format, dict[str, Any]] = {}
    for format, shape, _ in layers:
        entry = entries.setdefault(format, {"format": format.to_dict(), "layers": 0, "weights": 0})
        entry["layers"] += 1
        entry["weights"] += math.prod(shape)
    return list(entries.values())


def _float_plan(streamed: StreamedModel, kv_bytes: int) -> dict[str, Any]:
    count = sum(torch.Size(streamed.shape(name)).numel() for name in streamed.names())
    size = float_bytes(streamed)
    return {
        "method": "none",
        "format": None,
        "formats": [],
        "attention": None,
        "layers": 0,
        "quantized_weights": 0,
        "bits_per_weight": 8 * (size + kv_bytes) / max(count, 1),
        "size_bytes": size + kv_bytes,
        "original_bytes": size,
        "size_ratio": (size + kv_bytes) / max(size, 1),
        "head_bits_per_weight": None,
        "head_bytes": 0,
        "head_note": "",
        "unquantized_bytes": size,
    }


def report_plan(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the plan of a finished folder, as far as its files tell it."""
    recipe, report = checkpoint.report.get("recipe"), checkpoint.report
    inside = [name for name in checkpoint.formats if name not in checkpoint.outside]
    formats = _formats((checkpoint.formats[name], checkpoint.shape(name), name) for name in inside)
    return {
        "method": recipe["name"] if recipe else "none",
        "format": max(formats, key=lambda entry: entry["weights"])["format"] if formats else None,
        "formats": formats,
        "attention": (recipe or {}).get("attention"),
        "layers": len(inside),
        "quantized_weights": sum(math.prod(checkpoint.shape(name)) for name in inside),
        **{key: report.get(key) for key in ("bits_per_weight", "head_bits_per_weight", "head_bytes")},
        "head_note": report.get("head_note", ""),
        "source_types": report.get("source_types", []),
        **{key: report.get(key) for key in ("unquantized_bytes", "original_bytes", "size_ratio")},
    }


@checked_arguments()
def stored_bits(model: str | Path | nn.Module, trust_remote_code: bool) -> tuple[float, int]:
    """Return the bits per weight and the bytes of a model.

    Args:
        model: a live module, a folder, the name of a demo model, a hub id, or a .gguf file.
        trust_remote_code: allow Python code in the folder to run.

    Returns:
        Bits per weight of the blocks' quantized layers, or of the float weights; bytes on disk, or in memory for
        a live module.
    """
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        size = sum(t.nbytes for t in tensors)
        packed = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.outside_blocks]
        if packed:
            bits, weights = _stored((m.format, m.shape, id(m.shared or m)) for m in packed)
            return bits / weights, size
        return 8 * size / max(sum(t.numel() for t in tensors), 1), size
    if is_bitmill_folder(user_path(model)):
        return open_checkpoint(model).bits_per_weight, folder_bytes(user_path(model))
    source = open_source(model, trust_remote_code=trust_remote_code)
    sizes = [(torch.Size(source.shape(n)).numel(), source.dtype(n).itemsize) for n in source.names()]
    total = sum(count * width for count, width in sizes)
    return 8 * total / max(sum(count for count, _ in sizes), 1), total


def _stored(layers: Iterable[_Layer]) -> tuple[int, int]:
    """Return the total bits and weights of layers."""
    known = list(layers)
    return total_stored_bits(known), sum(math.prod(shape) for _, shape, _ in known)
