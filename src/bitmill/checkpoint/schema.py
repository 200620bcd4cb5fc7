"""The `quantization_config` of config.json: how it is written, read and checked."""

from __future__ import annotations

from typing import Any

from bitmill.errors import CheckpointError, one_line, quoted
from bitmill.formats import FORMATS, Format
from bitmill.formats.quantized import SHARED
from bitmill.runtime.modules.replace import EmbeddingAndHeadConfig
from bitmill.version import __version__

QUANT_METHOD = "bitmill"
FORMAT_VERSION = 1


def layer_formats(config: dict[str, Any]) -> dict[str, Format]:
    """Return layer -> format of a `quantization_config`.

    Raises:
        CheckpointError: another tool or a later version wrote it, or it is damaged.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"The model is quantized by {quoted(config.get('quant_method'))} and not by bitmill; "
            "load it with that tool."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"The checkpoint has format version {quoted(version)}, and this bitmill ({__version__}) reads "
            f"{FORMAT_VERSION}; update bitmill."
        )
    formats: dict[str, Format] = {}
    try:
        for group in config["groups"]:
            format, layers = FORMATS.from_dict(group["format"]), group["layers"]
            if not isinstance(layers, list) or not all(name and isinstance(name, str) for name in layers):
                raise TypeError(f"layers are {quoted(layers)}")
            if twice := next((name for name in layers if name in formats), None):
                raise ValueError(f"{twice!r} is in two groups")
            formats.update(dict.fromkeys(layers, format))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(
            f"The quantization_config is damaged in 'groups' ({reason}); copy it again."
        ) from None
    return formats


def head_config(config: dict[str, Any]) -> EmbeddingAndHeadConfig | None:
    """Return the entry `ends` of a `quantization_config`, or None where embedding and head are in float.

    Raises:
        CheckpointError: it is damaged, or names layers that are not quantized.
    """
    ends = config.get("ends")
    if ends is None:
        return None
    try:
        embedding, head, tied = ends["embedding"], ends["head"], ends["tied"]
        stored = {name for group in config["groups"] for name in group["layers"]}
        own = [embedding] if tied else [path for path in (embedding, head) if path != ""]  # "": stays in float
        sound = isinstance(tied, bool) and isinstance(head, str) and own and stored.issuperset(own)
        if not sound or (tied and not head):
            raise ValueError(ends)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"The quantization_config is damaged in 'ends' ({reason}); copy it again.") from None
    return dict(ends)


def shared_paths(config: dict[str, Any]) -> dict[str, str]:
    """Return layer -> path of the module that holds its shared parts, for layers that share any.

    Raises:
        CheckpointError: a path is not below the module of shared parts.
    """
    places: dict[str, str] = {}
    for group in config["groups"]:
        place = group.get("shared")
        if place is None:
            continue
        sharing = FORMATS.from_dict(group["format"]).shared
        if not sharing or not isinstance(place, str) or not place.startswith(f"{SHARED}."):
            raise CheckpointError(
                f"The quantization_config is damaged: its layers cannot share what is in {quoted(place)}."
            )
        places.update(dict.fromkeys(group["layers"], place))
    return places


def quantization_config(
    layers: dict[str, Format],
    recipe: dict[str, Any],
    places: dict[str, str] | None = None,
    ends: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json: the recipe, and formats with their layers.

    Args:
        layers: layer -> format.
        recipe: the recipe as plain data.
        places: layer -> path of the module that holds its shared parts.
        ends: embedding, head and whether they are tied, where they are quantized.
    """
    groups: list[dict[str, Any]] = []
    for name, format in layers.items():
        place = (places or {}).get(name)
        described = {"format": format.to_dict(), **({"shared": place} if place else {})}
        group = next((g for g in groups if {k: v for k, v in g.items() if k != "layers"} == described), None)
        if group is None:
            group = {**described, "layers": []}
            groups.append(group)
        group["layers"].append(name)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bitmill_version": __version__,
        "groups": groups,
        **({"ends": ends} if ends else {}),
        "recipe": recipe,
    }
