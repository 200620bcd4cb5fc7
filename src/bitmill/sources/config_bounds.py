"""Bounds of a config that is only data yet: what it describes is built before its weights are seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitmill.config.documents import read_json_object
from bitmill.errors import BitmillError, SourceError, quoted

MAX_CONFIG_BYTES = 1 << 25
MAX_PARTS = 4_096  # blocks, experts, ...: far above any model, and built in seconds
MAX_SIZE = 1 << 40
_PARTS = re.compile(r"(layers|blocks|experts|stages|depths?|^n_layer|^n_block)$")


def check_config(config: dict[str, Any], path: Path | str, error: type[BitmillError] = SourceError) -> None:
    """Check the numbers of a config before a model is built of it.

    Args:
        config: the config as plain data.
        path: the file, or words for it in messages.
        error: class of the error to raise.

    Raises:
        BitmillError: of the class `error`: a number of blocks that no model has, or a size beyond 40 bits.
    """
    for key, value in _integers(config):
        limit = MAX_PARTS if _PARTS.search(key) else MAX_SIZE
        if abs(value) > limit:
            raise error(f"{path} gives {quoted(key)} as {quoted(value)}, more than any model has; fetch it again.")


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json, within bounds.

    Raises:
        SourceError: the file cannot be read, is too large or no JSON object, or has numbers out of bounds.
    """
    config = read_json_object(path, SourceError, MAX_CONFIG_BYTES, "fetch it again")
    check_config(config, path)
    return config


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer with its key; those in lists have the key of the list."""
    if type(value) is int:
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name != "quantization_config":
                yield from _integers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner, key)
