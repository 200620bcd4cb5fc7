"""What a comparison consists of: cells, each a recipe, and the terms on which all of them are measured.

Plain data: it is written to `grid.json`, from which the processes that do the work read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from bitmill.data.windows import CalibrationData
from bitmill.errors import RecipeError, UsageError
from bitmill.pipeline.job import Propagate
from bitmill.recipes.compose import find_recipe, with_head
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.recipes.recipe import Recipe

Options = Mapping[str, Mapping[str, Any]]

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that reverses a string.",
)
NEW_TOKENS = 48
FLOAT = "float"  # the cell that is not quantized


@dataclass(frozen=True)
class Cell:
    """One variant of the model.

    name: also the name of its files.
    method: what it shares with its siblings at other bits.
    bits: as asked for; those of its format where nobody asked.
    recipe: plain data, None when the method cannot be had at these bits.
    reason: why it cannot, one sentence.
    """

    name: str
    method: str
    bits: int | None
    recipe: dict[str, Any] | None
    reason: str | None = None


@dataclass(frozen=True)
class Grid:
    """Cells and their common terms.

    calibration: which text calibrates; its windows' length and its held-out part also measure.
    windows: held-out windows to measure on.
    propagate: what later blocks are calibrated on; with "float" all cells share the statistics of one pass.
    command: what a user would type for it; it decides nothing.
    """

    model: str
    cells: tuple[Cell, ...]
    calibration: CalibrationData = field(default_factory=CalibrationData)
    windows: int = 40
    prompts: tuple[str, ...] = PROMPTS
    max_new_tokens: int = NEW_TOKENS
    propagate: Propagate = "quantized"
    device: str = "cpu"
    trust_remote_code: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if self.propagate not in get_args(Propagate):
            raise UsageError(f"propagate is {self.propagate!r}; use one of {', '.join(get_args(Propagate))}.")
        if self.windows < 1:
            raise UsageError(f"windows is {self.windows}; use at least 1.")
        names = [cell.name for cell in self.cells]
        if not names:
            raise UsageError("There is nothing to compare; name methods with --methods or recipes with --recipes.")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"Two variants are called {twice!r}; give their recipes different names.")
        if FLOAT in names:
            raise UsageError(f"A variant cannot be called {FLOAT!r}, which is the float model; rename its recipe.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Grid:
        """A grid from what `to_dict` gave, through JSON or not."""
        return cls(
            **{
                **data,
                "cells": tuple(Cell(**cell) for cell in data["cells"]),
                "calibration": CalibrationData(**data["calibration"]),
                "prompts": tuple(data["prompts"]),
            }
        )


def plan_cells(
    methods: Sequence[str],
    bits: Sequence[int],
    recipes: Sequence[str | Path] = (),
    options: Options | None = None,
    head_bits: int | None = None,
) -> tuple[Cell, ...]:
    """One cell for every method at every number of bits, and one for every recipe file.

    head_bits: of embedding and head, in all cells.
    options: of each method by name, such as {"gptq": {"damp": 0.05}}. A method without an option `bits` has one
    cell. A method that refuses some bits has a cell that says so; unknown methods and options, and values that
    are wrong at any bits, raise RecipeError.
    """
    options = options or {}
    if stray := next((name for name in options if name not in methods), None):
        raise UsageError(f"There are options for {stray!r}, which is not among the methods; add it to --methods.")
    if len(set(methods)) < len(methods) or len(set(bits)) < len(bits):
        raise UsageError("A method or a number of bits is named twice; name each once.")
    if methods and not bits:
        raise UsageError("There are methods and no bits; give some with --bits, such as --bits 3,4.")
    cells: list[Cell] = []
    for method in methods:
        given = dict(options.get(method, {}))
        if "bits" in given:
            raise UsageError(f"The bits of {method!r} are set as an option; give them with --bits.")
        if "bits" in METHODS.get(method).__dataclass_fields__:
            row = [_cell(method, count, given, head_bits) for count in bits]
            if not any(cell.recipe for cell in row):
                with_head(build_recipe(method, given), head_bits)  # refuses what is wrong at any bits
            cells += row
        else:
            fixed = with_head(build_recipe(method, given), head_bits)
            cells.append(Cell(_file_name(method), method, _bits_of(fixed), fixed.to_dict()))
    for path in recipes:
        recipe = with_head(find_recipe(str(path)), head_bits)
        cells.append(Cell(_file_name(recipe.name), recipe.name, _bits_of(recipe), recipe.to_dict()))
    return tuple(cells)


def _cell(method: str, bits: int, options: dict[str, Any], head_bits: int | None) -> Cell:
    name = f"{_file_name(method)}-{bits}bit"
    try:
        recipe = with_head(build_recipe(method, {**options, "bits": bits}), head_bits)
        return Cell(name, method, bits, recipe.to_dict())
    except RecipeError as error:
        return Cell(name, method, bits, None, str(error))


def _bits_of(recipe: Recipe) -> int:
    return int(recipe.stored.rate)


def _file_name(text: str) -> str:
    """The text without what a file name should not have."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    if not name:
        raise UsageError(f"The recipe name {text!r} cannot name a file; use letters and digits.")
    return name
