"""Configs of known models that come with bitmill, for planning: `data/NAME.json`, without weights."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_DATA = files("bitmill").joinpath("sources/data")


def known_configs() -> list[str]:
    """Their names."""
    return sorted(file.name.removesuffix(".json") for file in _DATA.iterdir() if file.name.endswith(".json"))


def known_config(name: str) -> dict[str, Any]:
    """What config.json would hold."""
    config: dict[str, Any] = json.loads(_DATA.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return config
