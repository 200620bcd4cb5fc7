"""The grid of a comparison: its variants, each a recipe, and the settings shared by all of them.

Plain data: the grid is written to `grid.json`, from which the worker processes read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from bitmill.data.text import TextSource
from bitmill.data.windows import CalibrationData
from bitmill.errors import RecipeError, UsageError, quoted
from bitmill.evaluation.answers import NEW_TOKENS, PROMPTS
from bitmill.pipeline.job import Propagate
from bitmill.recipes.compose import HeadBits, find_recipe, with_head
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.workflows.prepared_tasks import LIMIT

Options = Mapping[str, Mapping[str, Any]]

MAX_NAME_BYTES = 200  # of a variant, whose name gets suffixes in the names of files
FLOAT = "float"  # name of the float model among the variants


@dataclass(frozen=True)
class VariantSpec:
    """One variant of the model to quantize and measure.

    Attributes:
        name: also the name of its files.
        method: common to its variants at other bits.
        bits: as requested; those of the format where none were requested.
        recipe: plain data; None when the method does not have these bits.
        reason: one sentence why it does not.
    """

    name: str
    method: str
    bits: int | None
    recipe: dict[str, Any] | None
    reason: str | None = None


@dataclass(frozen=True)
class Grid:
    """The variants of a comparison and their common settings.

    Attributes:
        model: name or path of the float model.
        variants: in the order of the results.
        calibration: calibration text; its window length and, without `text`, its held-out part serve to measure.
        windows: number of held-out windows to measure on, of each domain for a mixture.
        text: another text to measure on.
        prompts: answered greedily by every variant, in at most `max_new_tokens` tokens.
        tasks: names of benchmark tasks that every variant is measured on.
        limit: first documents of each task; None for all.
        run_code: run the programs that variants write for tasks.
        propagate: inputs for calibrating later blocks; with "float" all variants share the statistics of one pass.
        command: an equivalent command line, for the record.
    """

    model: str
    variants: tuple[VariantSpec, ...]
    calibration: CalibrationData = field(default_factory=CalibrationData)
    windows: int = 40
    text: TextSource | None = None
    prompts: tuple[str, ...] = PROMPTS
    max_new_tokens: int = NEW_TOKENS
    tasks: tuple[str, ...] = ()
    limit: int | None = LIMIT
    run_code: bool = False
    propagate: Propagate = "quantized"
    device: str = "cpu"
    trust_remote_code: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if self.propagate not in get_args(Propagate):
            raise UsageError(f"propagate is {self.propagate!r}; use one of {', '.join(get_args(Propagate))}.")
        if self.windows < 1:
            raise UsageError(f"windows is {self.windows}; use at least 1.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is {self.limit}; use at least 1.")
        names = [variant.name for variant in self.variants]
        if not names:
            raise UsageError("There is nothing to compare; name methods with --methods or recipes with --recipes.")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"Two variants are called {twice!r}; give their recipes different names.")
        if FLOAT in names:
            raise UsageError(f"A variant cannot be called {FLOAT!r}, which is the float model; rename its recipe.")

    @property
    def measured_text(self) -> TextSource:
        """The text whose held-out part every variant is measured on."""
        return self.calibration.source if self.text is None else self.text

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        data = asdict(self)
        return {"model": data.pop("model"), "cells": data.pop("variants"), **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Grid:
        """Return the grid from the output of `to_dict`, through JSON or not."""
        data = dict(data)
        return cls(
            variants=tuple(VariantSpec(**variant) for variant in data.pop("cells")),
            calibration=CalibrationData(**data.pop("calibration")),
            prompts=tuple(data.pop("prompts")),
            tasks=tuple(data.pop("tasks", ())),
            **data,
        )


def plan_variants(
    methods: Sequence[str],
    bits: Sequence[int],
    recipes: Sequence[str | Path] = (),
    options: Options | None = None,
    head_bits: HeadBits | None = None,
) -> tuple[VariantSpec, ...]:
    """Return one variant for every method at every number of bits, and one for every recipe file.

    A method without an option `bits` has one variant. Bits that a method refuses make a variant without recipe,
    where another method has them.

    Args:
        methods: names of methods.
        bits: numbers of bits for each of them.
        recipes: recipe files or names of user recipes.
        options: of each method by name, such as {"gptq": {"damp": 0.05}}.
        head_bits: bits of embedding and head, in all variants.

    Raises:
        UsageError: the lists contradict each other.
        RecipeError: a method or option is unknown, or a value is wrong at any bits.
    """
    options = options or {}
    _check_lists(methods, bits, options)
    variants: list[VariantSpec] = []
    for method in methods:
        given = dict(options.get(method, {}))
        if "bits" in given:
            raise UsageError(f"The bits of {method!r} are set as an option; give them with --bits.")
        if "bits" in METHODS.get(method).__dataclass_fields__:
            row = [_variant_at(method, count, given, head_bits) for count in bits]
            if not any(variant.recipe for variant in row):
                with_head(build_recipe(method, given), head_bits)  # raises for values that are wrong at any bits
            variants += row
        else:
            recipe = with_head(build_recipe(method, given), head_bits)
            variants.append(VariantSpec(file_name(method), method, _bits_of(recipe), recipe.to_dict()))
    _check_bits(bits, variants)
    for path in recipes:
        variants.append(recipe_variant(with_head(find_recipe(str(path)), head_bits)))
    return tuple(variants)


def recipe_variant(recipe: Recipe) -> VariantSpec:
    """Return the variant of a recipe, which has its name."""
    return VariantSpec(file_name(recipe.name), recipe.name, _bits_of(recipe), recipe.to_dict())


def _check_lists(methods: Sequence[str], bits: Sequence[int], options: Options) -> None:
    if stray := next((name for name in options if name not in methods), None):
        raise UsageError(f"There are options for {stray!r}, which is not among the methods; add it to --methods.")
    if len(set(methods)) < len(methods) or len(set(bits)) < len(bits):
        raise UsageError("A method or a number of bits is named twice; name each once.")
    if methods and not bits:
        raise UsageError("There are methods and no bits; give some with --bits, such as --bits 3,4.")


def _check_bits(bits: Sequence[int], variants: Sequence[VariantSpec]) -> None:
    """Raise RecipeError for a number of bits that no method has: a slip, before anything is opened or measured."""
    for count in bits:
        row = [variant for variant in variants if variant.bits == count]
        if row and not any(variant.recipe for variant in row):
            raise RecipeError(f"--bits has {count}, which none of the methods has: {row[0].reason}")


def _variant_at(method: str, bits: int, options: dict[str, Any], head_bits: HeadBits | None) -> VariantSpec:
    name = f"{file_name(method)}-{bits}bit"
    try:
        recipe = with_head(build_recipe(method, {**options, "bits": bits}), head_bits)
        return VariantSpec(name, method, bits, recipe.to_dict())
    except RecipeError as error:
        return VariantSpec(name, method, bits, None, str(error))


def _bits_of(recipe: Recipe) -> int:
    return int(recipe.default.format.rate)


def file_name(text: str) -> str:
    """Return the text without characters that a file name should not have."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    if not name:
        raise UsageError(f"The recipe name {quoted(text)} cannot name a file; use letters and digits.")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UsageError(f"The recipe name {quoted(text)} is too long to name a file; shorten it.")
    return name
