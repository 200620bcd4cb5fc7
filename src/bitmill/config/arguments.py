"""Types of the arguments of public functions, checked where they enter."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from bitmill.config.documents import MAX_INTEGER
from bitmill.errors import BitmillError, UsageError, quoted

F = TypeVar("F", bound=Callable[..., Any])

_ABSTRACT = {int: numbers.Integral, float: numbers.Real, Path: os.PathLike}  # numpy's numbers are numbers too
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def checked_arguments(*unchecked: str) -> Callable[[F], F]:
    """Return a decorator that checks the arguments of a function against its annotations.

    A wrong one raises a UsageError that names it.

    Args:
        unchecked: names of parameters that take more than their annotation allows, or are checked by the function.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            hints = _hints(function)
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                is_options = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
                if not is_options and name in hints and name not in unchecked:
                    check_argument(name, value, hints[name])
            return function(*args, **kwargs)

        return typing.cast(F, checked)

    return decorate


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Return a decorator that accepts old names of keywords, with a FutureWarning, until the next release.

    Args:
        names: old name -> new name.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for old in kwargs.keys() & names.keys():
                new = names[old]
                if new in kwargs:
                    raise UsageError(f"{new} is given twice, also by its old name {old}; leave out {old}.")
                warnings.warn(
                    f"{old} of {function.__name__} is now called {new}, and the old name will be removed in the "
                    "next release.",
                    FutureWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return typing.cast(F, renamed)

    return decorate


def check_seed(seed: int, error: type[BitmillError]) -> None:
    """Raise an error of this class for a seed that the generators of torch do not have."""
    if not -(1 << 63) <= seed < 1 << 64:
        raise error(f"The seed {quoted(seed)} has more than 64 bits; use a smaller one.")


def check_characters(text: str, owner: str, error: type[BitmillError]) -> None:
    """Raise an error for half a surrogate pair, as which Python reads bytes that are not UTF-8.

    Args:
        text: the text; tokenizers do not read such halves.
        owner: what holds it, for the message.
        error: class of the error.
    """
    try:
        text.encode()
    except UnicodeEncodeError as found:
        half = f"\\u{ord(text[found.start]):04x}"
        raise error(
            f"{owner} has half a surrogate pair, {half}, at character {found.start}, which is no text; remove it."
        ) from None


def check_argument(name: str, value: Any, hint: Any) -> None:
    """Raise UsageError for a value that is not of an annotated type, or an integer of more than 64 bits."""
    if not _matches(value, hint):
        raise UsageError(f"{name} is {quoted(value)}; use {_describe(hint)}.")
    if isinstance(value, int) and not -MAX_INTEGER < value < MAX_INTEGER:
        raise UsageError(f"{name} is a number of more than 64 bits; use a smaller one.")


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _matches(value: Any, hint: Any) -> bool:
    return any(_is_of(value, member) for member in _members(hint))


def _is_of(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    origin = typing.get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in typing.get_args(kind))
    if origin is not None:
        if not isinstance(value, origin) or isinstance(value, (str, bytes)):
            return False
        inner = typing.get_args(kind)
        return issubclass(origin, Mapping) or all(_matches(element, inner[0]) for element in value)
    if isinstance(value, bool) and kind in (int, float):
        return False
    return isinstance(value, _ABSTRACT.get(kind, kind))


def _describe(hint: Any) -> str:
    words = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            words += [repr(word) for word in typing.get_args(member)]
        elif member is not type(None):
            origin = typing.get_origin(member) or member
            words.append(_WORDS.get(member, f"a {getattr(origin, '__name__', origin)}"))
    return " or ".join(words)
