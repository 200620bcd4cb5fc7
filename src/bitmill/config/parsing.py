"""Parse parts as they are spelled on the command line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from bitmill.config.registry import Registry
from bitmill.errors import RecipeError

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def part_of(registry: Registry[Any], spelled: str) -> dict[str, Any]:
    """The plain data of `NAME:key=value,...`. Raises RecipeError."""
    name, _, options = spelled.partition(":")
    part: dict[str, Any] = {registry.noun: name.strip()}
    known = registry.options(name.strip())
    for option in filter(None, (o.strip() for o in options.split(","))):
        key, equals, value = option.partition("=")
        if key not in known:
            raise registry.no_option(name.strip(), key)
        if not equals:
            raise RecipeError(
                f"The option {key!r} of the {registry.noun} {name.strip()!r} has no value; write {key}=VALUE."
            )
        part[key] = value_of(value)
    return part


def value_of(text: str) -> Any:
    """A value as in YAML, and numbers such as 1e-3, which YAML 1.1 wants as 1.0e-3."""
    if _EXPONENT.fullmatch(text.strip()):
        return float(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text  # the check of the field's type will say what is wrong with it
