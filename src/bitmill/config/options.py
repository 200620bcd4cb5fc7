"""Options of methods, formats, solvers and other members: dataclass fields, checked by pydantic.

Recipes come from YAML files and command lines. A value of the wrong type is refused where it enters, by name, and
does not surface later as arithmetic that fails.
"""

from __future__ import annotations

import typing
from dataclasses import field, fields
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Any, Literal

from pydantic import InstanceOf, TypeAdapter, ValidationError

from bitmill.config.documents import MAX_INTEGER
from bitmill.errors import RecipeError, quoted

MAX_DIGITS = len(str(MAX_INTEGER))

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null"}


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and a help text, which the command line and the docs show."""
    return field(default=default, metadata={"help": help})


def check_types(instance: Any, owner: str) -> None:
    """Check every field of a dataclass against its annotation; values are not converted.

    Args:
        instance: the dataclass instance.
        owner: name of the instance in messages.

    Raises:
        RecipeError: a field does not have its annotated type; names the field and the value.
    """
    hints = type_hints(instance.__class__)
    for part in fields(instance):
        value, hint = getattr(instance, part.name), hints[part.name]
        try:
            _adapter(hint).validate_python(value, strict=True)
        except ValidationError:
            raise RecipeError(f"{part.name} of {owner} is {quoted(value)}; use {describe_type(hint)}.") from None
        if isinstance(value, int) and not -MAX_INTEGER < value < MAX_INTEGER:
            raise RecipeError(f"{part.name} of {owner} is a number of more than 64 bits; use a smaller one.")


def parse_text(text: str, hint: Any) -> Any:
    """Convert text from the command line to an annotated type.

    Raises:
        ValueError: the text cannot be converted.
    """
    return _adapter(hint).validate_strings(text)  # a ValidationError is a ValueError


def is_count(text: str) -> bool:
    """Return True for a whole number in decimal digits that 64 bits can hold."""
    return text.isascii() and text.isdecimal() and len(text) < MAX_DIGITS


def type_hints(kind: type) -> dict[str, Any]:
    """Return the resolved annotations of a class."""
    return _resolved(kind)


@cache
def _resolved(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def describe_type(hint: Any) -> str:
    """Return an annotation in words, such as "a whole number or null"."""
    words = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            words += [repr(word) for word in typing.get_args(member)]
        else:
            words.append(_WORDS.get(member, str(member)))
    return " or ".join(words)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of an annotation; classes of ours are checked by isinstance."""
    members: list[Any] = [_validated(member) for member in _members(hint)]
    return TypeAdapter(reduce(or_, members))


def _validated(member: Any) -> Any:
    plain = typing.get_origin(member) is not None or member in _WORDS
    return member if plain else InstanceOf[member]  # type: ignore[misc]


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)
