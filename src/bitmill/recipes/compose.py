"""Recipes composed of parts: any format, solver, transforms, tuners and rules, on top of a named method.

A part is spelled `NAME` or `NAME:key=value,key=value`, as on the command line, with values as in YAML:
`codebook:bits=3,group_size=row`. Options that a part leaves out have their defaults; bits default to those of
the base recipe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bitmill.config.parsing import parse_part, parse_value
from bitmill.config.paths import user_path
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format
from bitmill.recipes.attention import parse_attention
from bitmill.recipes.defaults import DEFAULT_BITS
from bitmill.recipes.embedding_and_head import head_format
from bitmill.recipes.inputs import FLOAT, Inputs, parse_inputs
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule, format_of, parse_rule
from bitmill.solvers import SOLVERS
from bitmill.transforms import TRANSFORMS
from bitmill.tuners import TUNERS

HEAD_BITS = (8, 6, 4)
HeadBits = int | Literal["float"]


def compose(
    base: Recipe,
    *,
    format: str | None = None,
    solver: str | None = None,
    transforms: Sequence[str] = (),
    tuners: Sequence[str] = (),
    sparse: float | None = None,
    inputs: str | None = None,
    attention: Sequence[str] = (),
    rules: Sequence[str | Rule] = (),
    simulate: bool = False,
) -> Recipe:
    """Return `base` with other parts.

    Args:
        base: the recipe to start from.
        format: weight format in place of its own.
        solver: solver in place of its own.
        transforms: added after its own.
        tuners: added after its own.
        sparse: share of the weights that are stored apart from the dense format, in fp16.
        inputs: format of the inputs of layers, or "float", in place of its own.
        attention: `SITE=FORMAT:key=value,...` for queries, keys, values and probabilities, in place of its own.
        rules: exceptions for some layers, `PATTERN=FORMAT:key=value,...` or `PATTERN=float`; they come first,
            in place of rules of `base` with an equal pattern.
        simulate: inputs that no kernel multiplies as they are stored are rounded, and multiplied in floats.

    Raises:
        RecipeError: an unknown part or option, or parts that cannot work together.
    """
    names, weight = [base.name], base.weight
    chosen: dict[str, Any] = {}
    if format is not None:
        weight = format_of(format, base.weight)
        names.append(weight.name)
    if sparse is not None:
        weight = FORMATS.from_dict(
            {"format": "sum", "inner": weight.to_dict(), "outliers": sparse, "sensitive": 0.0}
        )
        names.append("sparse")
    if inputs is not None:
        chosen["inputs"] = parse_inputs(inputs)
        names.append("inputs")
    if attention:
        chosen["attention"] = parse_attention(attention)
        names.append("attention")
    if solver is not None:
        chosen["solver"] = SOLVERS.from_dict(parse_part(SOLVERS, solver))
        names.append(chosen["solver"].name)
    more = {
        "transforms": [TRANSFORMS.from_dict(parse_part(TRANSFORMS, spelled)) for spelled in transforms],
        "tuners": [TUNERS.from_dict(parse_part(TUNERS, spelled)) for spelled in tuners],
    }
    for noun, members in more.items():
        names += [member.name for member in members]
        chosen[noun] = (*getattr(base, noun), *members)
    if rules:
        parsed = [rule if isinstance(rule, Rule) else parse_rule(rule, weight) for rule in rules]
        names.append("rules")
        given = {rule.sites for rule in parsed}
        chosen["rules"] = (*parsed, *(rule for rule in base.rules if rule.sites not in given))
    if simulate:
        own = chosen.get("inputs", base.inputs)
        chosen["inputs"] = _simulated(own, weight)
        chosen["rules"] = tuple(_simulated_rule(rule, weight, own) for rule in chosen.get("rules", base.rules))
    return replace(base, name="+".join(names), weight=weight, **chosen)


def _simulated(inputs: Inputs | None, weight: Format) -> Inputs | None:
    """Return inputs that are a simulation if no kernel multiplies them with such weights as both are stored."""
    return replace(inputs, simulated=True) if inputs and inputs.unsupported_reason(weight) else inputs


def _simulated_rule(rule: Rule, weight: Format, inputs: Inputs | None) -> Rule:
    """Return a rule whose inputs are a simulation where they have to be.

    Args:
        rule: the rule.
        weight, inputs: of the recipe, where the rule has none of its own.
    """
    own = inputs if rule.inputs is None else rule.inputs
    if rule.is_float or not isinstance(own, Inputs):
        return rule
    simulated = _simulated(own, rule.weight if isinstance(rule.weight, Format) else weight)
    return rule if simulated == own else replace(rule, inputs=simulated)


def with_head(recipe: Recipe, head_bits: HeadBits | None) -> Recipe:
    """Return `recipe` with embedding and head at `head_bits` bits in groups of 64 columns.

    Args:
        recipe: the recipe.
        head_bits: one of HEAD_BITS, or "float"; None keeps the recipe as it is.

    Raises:
        RecipeError: another number of bits.
    """
    if head_bits is None:
        return recipe
    if head_bits == FLOAT:
        return replace(recipe, head=FLOAT)
    if isinstance(head_bits, bool) or head_bits not in HEAD_BITS:
        known = ", ".join(str(bits) for bits in HEAD_BITS[:-1])
        raise RecipeError(
            f"head_bits is {head_bits!r}; use {known} or {HEAD_BITS[-1]}, or float to leave embedding and head as "
            "they are."
        )
    return replace(recipe, head=head_format(int(head_bits)))


def from_parts(format: str, solver: str, options: dict[str, Any] | None = None) -> Recipe:
    """Return a recipe of a format and a solver alone, to be extended by `compose`.

    Args:
        format: the weight format as a part.
        solver: the solver as a part.
        options: options of the format that the part leaves out; `bits` defaults to DEFAULT_BITS.

    Raises:
        RecipeError: an unknown part or option, or parts that cannot work together.
    """
    part = parse_part(FORMATS, format)
    known = FORMATS.options(part["format"])
    if stray := next((key for key in options or {} if key not in known), None):
        raise RecipeError(
            f"There is no method whose option {stray!r} could be set, and the format {part['format']!r} has none "
            "of that name; give --method, or options with the parts, as in NAME:key=value."
        )
    given = {"bits": DEFAULT_BITS} if "bits" in known else {}
    given |= {key: parse_value(str(value)) for key, value in (options or {}).items()}
    weight = FORMATS.from_dict({**given, **part})
    solved = SOLVERS.from_dict(parse_part(SOLVERS, solver))
    return Recipe(f"{weight.name}+{solved.name}", weight, solved)


def find_recipe(method: str, options: dict[str, Any] | None = None) -> Recipe:
    """Return the recipe of a named method, of a file, or of the user's recipe folder.

    Args:
        method: name of a method, path of a recipe file, or name of a file in the user's folder.
        options: options of the named method.

    Raises:
        RecipeError: there is no such recipe.
    """
    if method not in METHODS.names() and (file := user_recipes().get(method)):
        return build_recipe(str(file), options)
    return build_recipe(method, options)


def user_recipes() -> dict[str, Path]:
    """Return name -> file of the recipes in the user's folder: BITMILL_RECIPES, else ~/.config/bitmill/recipes."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    folder = user_path(os.environ.get("BITMILL_RECIPES") or config / "bitmill" / "recipes")
    return {file.stem: file for file in sorted(folder.glob("*.y*ml"))} if folder.is_dir() else {}
