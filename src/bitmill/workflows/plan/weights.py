"""Bytes of the weights: as they are stored, in 16 bits, and as a method would store them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.errors import RecipeError, SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.compose import find_recipe, with_head
from bitmill.recipes.method import METHODS
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.sources.base import Source
from bitmill.sources.gguf import GgufSource
from bitmill.workflows.sizes import storage_plan

BITS = (8, 4, 3, 2)
FLOAT_BITS = 16
BASELINE = "rtn"  # whose uniform groups stand for every method of as many bits


@dataclass(frozen=True)
class Wanted:
    """How the weights are to be stored, as for `quantize`; as they are where nothing is said."""

    method: str | None = None
    bits: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    head_bits: int | None = None

    @property
    def asks(self) -> bool:
        """Whether weights are to be quantized."""
        named = self.method is not None or bool(self.options) or self.head_bits is not None
        return named or self.bits not in (None, FLOAT_BITS)

    def recipe(self, bits: int | None) -> Recipe:
        """The method at these bits. Raises RecipeError where it has not got them."""
        given = self.options | ({} if bits is None else {"bits": bits})
        return with_head(find_recipe(self.method or BASELINE, given), self.head_bits)

    def recipes(self) -> list[Recipe]:
        """The method at every width it has, most bits first, and what was asked for."""
        found = [self.recipe(self.bits)] if self.asks else []
        name = self.method or BASELINE
        for bits in BITS if name in METHODS.names() and "bits" in METHODS.options(name) else ():
            try:
                found.append(self.recipe(bits))
            except RecipeError:  # it has no such bits
                continue
        unique = {recipe.to_json(): recipe for recipe in found}
        return sorted(unique.values(), key=lambda recipe: recipe.stored.rate, reverse=True)


def weight_rows(
    model: str | Path, source: Source, streamed: StreamedModel | str, wanted: Wanted
) -> list[dict[str, Any]]:
    """Every way to store the weights, as plain data; exactly one is chosen: what was asked for, or what would run.

    skeleton: or why there is none, and nothing can be quantized. Raises SourceError if that was asked for.
    """
    count = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    stored, runs = stored_bytes(model, source)
    bits = None if wanted.asks else wanted.bits if runs else FLOAT_BITS
    rows = [_float_row("as stored", stored, count, not wanted.asks and bits is None)]
    if stored != 2 * count or bits == FLOAT_BITS:
        rows.append(_float_row("16 bits", 2 * count, count, bits == FLOAT_BITS))
    if isinstance(streamed, str):
        if wanted.asks:
            raise SourceError(streamed)
        return rows
    chosen = wanted.recipe(wanted.bits) if wanted.asks else None
    return rows + [_recipe_row(streamed, recipe, recipe == chosen) for recipe in wanted.recipes()]


def stored_bytes(model: str | Path, source: Source) -> tuple[int, bool]:
    """Bytes of the tensors as they lie on the disk, of a config alone as they would in its type.

    And whether they are run as they lie there; what a .gguf file holds is decoded first.
    """
    if is_checkpoint(Path(model)):
        return sum(int(tensor["size_bytes"]) for tensor in open_checkpoint(model).layers()), True
    if isinstance(source, GgufSource):
        return source.stored_bytes, False
    return sum(torch.Size(source.shape(n)).numel() * source.dtype(n).itemsize for n in source.names()), True


def _float_row(name: str, size: int, count: int, chosen: bool) -> dict[str, Any]:
    return {"name": name, "bits_per_weight": 8 * size / count, "size_bytes": size, "chosen": chosen}


def _recipe_row(streamed: StreamedModel, recipe: Recipe, chosen: bool) -> dict[str, Any]:
    stored = storage_plan(streamed, resolve_recipe(recipe, streamed))
    name = f"{recipe.name}, {recipe.stored.rate:g} bits"
    return {
        "name": name,
        "bits_per_weight": stored["bits_per_weight"],
        "size_bytes": stored["size_bytes"],
        "chosen": chosen,
    }
