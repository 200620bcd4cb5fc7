"""Check the fields of a dataclass against their annotations.

Recipes come from YAML files and command lines; a value of the wrong type must be refused where it enters,
by name, and not surface later as arithmetic that fails or, worse, as a truth value that is not meant.
"""

from __future__ import annotations

import typing
from dataclasses import field, fields
from functools import cache
from types import UnionType
from typing import Any, Literal

from bitmill.errors import RecipeError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null"}


def option(default: Any, help: str) -> Any:
    """A field of a method with its help text; the command line and the docs read it from here."""
    return field(default=default, metadata={"help": help})


def check_types(instance: Any, owner: str) -> None:
    """Raises RecipeError, naming the field and the value, when one does not have its annotated type."""
    hints = _hints(instance.__class__)
    for part in fields(instance):
        value, hint = getattr(instance, part.name), hints[part.name]
        if not _fits(value, hint):
            raise RecipeError(f"{part.name} of {owner} is {value!r}; use {_spell(hint)}.")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            if any(value == word and type(value) is type(word) for word in typing.get_args(member)):
                return True
        elif member is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif isinstance(value, member) and (member is bool or not isinstance(value, bool)):
            return True
    return False


def _spell(hint: Any) -> str:
    words = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            words += [repr(word) for word in typing.get_args(member)]
        else:
            words.append(_WORDS.get(member, str(member)))
    return " or ".join(words)
