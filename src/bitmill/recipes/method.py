"""Named methods: options with help texts, and the recipes they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bitmill.config.documents import read_document
from bitmill.config.options import check_types, describe_type, is_count, parse_text, type_hints
from bitmill.config.options import option as option  # methods import it from here
from bitmill.config.paths import user_path
from bitmill.config.registry import Registry
from bitmill.errors import RecipeError
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.recipe import Recipe

_NO_RECIPE = "give an existing one, or a named method (bitmill methods)"
METHODS: Registry[type[Method]] = Registry("method", "bitmill.recipes.methods")


@dataclass(frozen=True)
class Method:
    """Base of named methods: options with help, and the recipe they make.

    The class docstring is the method card that `bitmill methods NAME` prints.
    """

    def __post_init__(self) -> None:
        check_types(self, METHODS.name_of(self))

    def recipe(self) -> Recipe:
        """Return the recipe of these options."""
        raise NotImplementedError


def build_recipe(method: str, options: dict[str, Any] | None = None) -> Recipe:
    """Build the recipe of a named method, or read a YAML or JSON file.

    Args:
        method: the name of a method, or a path that ends in .yaml, .yml or .json.
        options: option name -> value; text is converted to the option's type.

    Raises:
        RecipeError: an unknown method or option, or a value of the wrong type or range.
    """
    options = options or {}
    if method.endswith((".yaml", ".yml", ".json")):
        if options:
            raise RecipeError(f"{method} is a recipe file, so change {', '.join(options)} in the file itself.")
        return Recipe.from_yaml(read_document(user_path(method), "recipe file", RecipeError, hint=_NO_RECIPE))
    kind = METHODS.get(method)
    known, hints = kind.__dataclass_fields__, type_hints(kind)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"The method {method!r} has no option {key!r}; it has: {', '.join(known)}.")
        values[key] = _parse_option(method, key, value, hints[key]) if isinstance(value, str) else value
    return kind(**values).recipe()


def _parse_option(method: str, key: str, text: str, hint: Any) -> Any:
    """Convert text from the command line to the type of an option."""
    if hint == GroupSize:
        return parse_group_size(text, key)
    try:
        return parse_text(text, hint)
    except ValueError:
        raise RecipeError(f"The option {key} of {method!r} is {text!r}; use {describe_type(hint)}.") from None


def parse_group_size(text: str | int, option: str = "group_size") -> int | Literal["row", "tensor"]:
    """Parse a group size: '64', 'row' (also -1) or 'tensor' (also 0).

    Args:
        text: the value.
        option: its name, for the error.

    Raises:
        RecipeError: the text is none of these.
    """
    word = str(text).strip().lower()
    if word in ("row", "-1"):
        return "row"
    if word in ("tensor", "0"):
        return "tensor"
    if is_count(word):
        return int(word)
    raise RecipeError(f"{option} is {text!r}; use a positive number of input columns, 'row' or 'tensor'.")
