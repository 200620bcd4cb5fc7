"""Parse parts as they are spelled on the command line."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from bitmill.config.documents import load_yaml
from bitmill.config.registry import Registry
from bitmill.errors import RecipeError

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def parse_part(registry: Registry[Any], spelled: str, extra: Container[str] = ()) -> dict[str, Any]:
    """Parse `NAME:key=value,...` to plain data.

    Args:
        registry: the registry that has the named member.
        spelled: the text.
        extra: keys that are allowed in addition to the member's options.

    Raises:
        RecipeError: an unknown name or option, or an option without value.
    """
    name, _, options = spelled.partition(":")
    part: dict[str, Any] = {registry.noun: name.strip()}
    known = registry.options(name.strip())
    for option in filter(None, (o.strip() for o in options.split(","))):
        key, equals, value = option.partition("=")
        if key not in known and key not in extra:
            raise registry.unknown_option(name.strip(), key)
        if not equals:
            raise RecipeError(
                f"The option {key!r} of the {registry.noun} {name.strip()!r} has no value; write {key}=VALUE."
            )
        part[key] = parse_value(value)
    return part


def parse_value(text: str) -> Any:
    """Parse a value as YAML does, and numbers such as 1e-3, which YAML 1.1 takes for text."""
    if _EXPONENT.fullmatch(text.strip()):
        return float(text)
    try:
        return load_yaml(text)
    except ValueError:
        return text  # the check of the field's type will say what is wrong with it
