"""Bytes of the weights: as stored, in 16 bits, and quantized by a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.config.paths import user_path
from bitmill.errors import RecipeError, SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.compose import HeadBits, find_recipe, with_head
from bitmill.recipes.method import METHODS
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.sources.base import Source
from bitmill.sources.gguf import GgufSource
from bitmill.workflows.sizes import storage_plan

BITS = (8, 4, 3, 2)
FLOAT_BITS = 16
BASELINE = "rtn"  # whose uniform groups represent all methods of these bits


@dataclass(frozen=True)
class WeightStorage:
    """The requested storage of the weights, with arguments as for `quantize`; as stored by default."""

    method: str | None = None
    bits: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    head_bits: HeadBits | None = None

    @property
    def is_quantized(self) -> bool:
        """True if weights are to be quantized."""
        named = self.method is not None or bool(self.options) or self.head_bits is not None
        return named or self.bits not in (None, FLOAT_BITS)

    def recipe(self, bits: int | None) -> Recipe:
        """Return the recipe of the method at `bits` bits; at its default bits for None.

        Raises:
            RecipeError: the method does not have these bits.
        """
        given = self.options | ({} if bits is None else {"bits": bits})
        return with_head(find_recipe(self.method or BASELINE, given), self.head_bits)

    def recipes(self) -> list[Recipe]:
        """Return the recipes of the method at all its bits, most bits first, and the requested one."""
        found = [self.recipe(self.bits)] if self.is_quantized else []
        name = self.method or BASELINE
        for bits in BITS if name in METHODS.names() and "bits" in METHODS.options(name) else ():
            try:
                found.append(self.recipe(bits))
            except RecipeError:  # the method does not have these bits
                continue
        unique = {recipe.to_json(): recipe for recipe in found}
        return sorted(unique.values(), key=lambda recipe: recipe.default.format.rate, reverse=True)


def weight_rows(
    model: str | Path, source: Source, streamed: StreamedModel | str, requested: WeightStorage
) -> list[dict[str, Any]]:
    """Return every storage of the weights as plain data, exactly one of them `chosen`.

    Args:
        model: name or path.
        source: its tensors.
        streamed: the model without weights, or the reason why its weights cannot be quantized.
        requested: the storage to mark as chosen; where it is not quantized, the one that would run.

    Raises:
        SourceError: weights are to be quantized and cannot be.
    """
    count = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    stored, runs_as_stored = stored_bytes(model, source)
    bits = None if requested.is_quantized else requested.bits if runs_as_stored else FLOAT_BITS
    rows = [_float_row("as stored", stored, count, not requested.is_quantized and bits is None)]
    if stored != 2 * count or bits == FLOAT_BITS:
        rows.append(_float_row("16 bits", 2 * count, count, bits == FLOAT_BITS))
    if isinstance(streamed, str):
        if requested.is_quantized:
            raise SourceError(streamed)
        return rows
    chosen = requested.recipe(requested.bits) if requested.is_quantized else None
    return rows + [_recipe_row(streamed, recipe, recipe == chosen) for recipe in requested.recipes()]


def stored_bytes(model: str | Path, source: Source) -> tuple[int, bool]:
    """Count the bytes of the tensors as stored.

    Args:
        model: name or path.
        source: its tensors; a config alone counts in its dtype.

    Returns:
        Bytes, and True if the model runs in this form: the tensors of a .gguf file are decoded before they run.
    """
    if is_checkpoint(user_path(model)):
        return sum(int(tensor["size_bytes"]) for tensor in open_checkpoint(model).layers()), True
    if isinstance(source, GgufSource):
        return source.stored_bytes, False
    return sum(torch.Size(source.shape(n)).numel() * source.dtype(n).itemsize for n in source.names()), True


def _float_row(name: str, size: int, count: int, chosen: bool) -> dict[str, Any]:
    return {"name": name, "bits_per_weight": 8 * size / count, "size_bytes": size, "chosen": chosen}


def _recipe_row(streamed: StreamedModel, recipe: Recipe, chosen: bool) -> dict[str, Any]:
    stored = storage_plan(streamed, resolve_recipe(recipe, streamed))
    name = f"{recipe.name}, {recipe.default.format.rate:g} bits"
    return {
        "name": name,
        "bits_per_weight": stored["bits_per_weight"],
        "size_bytes": stored["size_bytes"],
        "chosen": chosen,
    }
