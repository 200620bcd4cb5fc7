"""The metadata that the maker of a model published with it, for the card of the quantized model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitmill.config.documents import load_yaml, read_document
from bitmill.errors import SourceError
from bitmill.sources.base import Source
from bitmill.sources.gguf import GgufSource
from bitmill.sources.hf import HfSource
from bitmill.sources.zoo import ZOO

KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
CARD = "README.md"
MAX_CHARACTERS = 300
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def published_metadata(source: Source) -> dict[str, Any]:
    """Return what the maker of a model states about it.

    Args:
        source: the float model.

    Returns:
        Any of KEYS, from the card of a folder or from a GGUF file, and `id`, the id on the Hub of a demo model.
    """
    place = (
        source.folder if isinstance(source, HfSource) else source.path if isinstance(source, GgufSource) else None
    )
    for model in ZOO.values():
        if place == model.cached:
            return {"id": model.hub_id, "license": model.hub_licence}
    found = _card_metadata(source.folder / CARD) if isinstance(source, HfSource) else {}
    found = source.licence if isinstance(source, GgufSource) else found
    return {key: found[key] for key in KEYS if _is_plain(found.get(key))}


def _card_metadata(card: Path) -> dict[str, Any]:
    """Return the YAML at the top of a card; empty where there is none, or it cannot be read."""
    try:
        front_matter = _FRONT_MATTER.match(read_document(card, "card", SourceError))
        data = load_yaml(front_matter[1]) if front_matter else None
    except (SourceError, ValueError):  # a card is text for people, and no reason to refuse a model
        return {}
    return data if isinstance(data, dict) else {}


def _is_plain(value: Any) -> bool:
    """Return True for a short text or a list of such."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and 0 < len(text) <= MAX_CHARACTERS for text in texts)
