"""Formats of the token embedding and of the output head, which lie outside the blocks.

Rules that leave layers in float or match no layer of a block decide first, then the recipe's `head`. By default
both have 8 bits, so that a small model with a large vocabulary shrinks too; layers that cannot be packed then stay
in float, with one sentence that says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.models.embedding_and_head import EmbeddingAndHead, embedding_and_head, find_embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import FLOAT, Rule

DEFAULT_BITS = 8
SMALL_VOCABULARY = 1024  # tables of fewer rows stay in float by default: they are a small part of any model


@dataclass(frozen=True)
class HeadFormats:
    """The quantized layers outside the blocks.

    Attributes:
        recipe: the recipe, with the default format where it applies.
        ends: the quantized ones of embedding and head; None where both stay in float.
        formats: their formats, by path.
        note: one sentence where the default could not be applied; "" otherwise.
        names: paths of the embedding and the head that could be quantized.
    """

    recipe: Recipe
    ends: EmbeddingAndHead | None = None
    formats: dict[str, Format] = field(default_factory=dict)
    note: str = ""
    names: tuple[str, ...] = ()


def head_format(bits: int) -> Format:
    """Return the format of embedding and head at `bits` bits, in groups of 64 columns."""
    format: Format = FORMATS.from_dict({"format": "uniform", "bits": bits})
    return format


def choose_head_formats(recipe: Recipe, streamed: StreamedModel, linears: Collection[str]) -> HeadFormats:
    """Choose the formats of embedding and head.

    Args:
        recipe: the recipe.
        streamed: the model; no weight is read.
        linears: full names of the linear layers of all blocks.

    Raises:
        SourceError: the recipe names a format of the head, and the model has none that can have it.
    """
    found = embedding_and_head(streamed) if isinstance(recipe.head, Format) else find_embedding_and_head(streamed)
    if isinstance(found, str):
        return HeadFormats(recipe, note="" if recipe.head == FLOAT else f"{found}.")
    # a format for layers of blocks that happens to match the head as well is not meant for it
    rules = [rule for rule in recipe.rules if rule.is_float or not any(map(rule.matches, linears))]
    ruled = {layer: _first_rule(rules, found, layer) for layer in found.layers}
    default, note = recipe.head, ""
    if default is None:
        note = _small_vocabulary(found, streamed) if not all(ruled.values()) else ""
        default = FLOAT if note else head_format(DEFAULT_BITS)
    formats: dict[str, Format] = {}
    for layer, rule in ruled.items():
        format = rule.weight if rule is not None and rule.weight is not None else default
        if isinstance(format, GroupFormat):
            formats[layer] = format
        elif isinstance(format, Format):
            note = f"{layer} stays in float, as no row of a matrix in {format.name!r} can be looked up alone."
    if recipe.head is None and any(formats.get(layer) is default for layer in ruled):
        recipe = replace(recipe, head=default)  # so that recipe.yaml repeats the run
    names = tuple(filter(None, (found.embedding, found.head)))
    return HeadFormats(recipe, found.only(formats) if formats else None, formats, note, names)


def _first_rule(rules: Iterable[Rule], found: EmbeddingAndHead, layer: str) -> Rule | None:
    """Return the first rule that matches a layer by one of its names: a tied matrix has two."""
    names = (found.embedding, found.head) if found.tied else (layer,)
    return next((rule for rule in rules if any(map(rule.matches, names))), None)


def _small_vocabulary(found: EmbeddingAndHead, streamed: StreamedModel) -> str:
    if streamed.task.reads == "pictures":
        return "Embedding of patches and head stay in float; give --head-bits (head_bits) to pack them."
    rows: Any = streamed.shape(found.stored_name(found.embedding, streamed))[0]
    if rows >= SMALL_VOCABULARY:
        return ""
    return f"Embeddings stay in float, as a vocabulary of {rows:,} is too small to be worth packing."
