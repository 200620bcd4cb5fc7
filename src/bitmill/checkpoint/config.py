"""What config.json says about a quantized model."""

from __future__ import annotations

from typing import Any

from bitmill.formats import Format
from bitmill.runtime.hf import FORMAT_VERSION, QUANT_METHOD
from bitmill.version import __version__


def quantization_config(
    layers: dict[str, Format], recipe: dict[str, Any], ends: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json: formats, each with the layers that use it, and the recipe.

    ends: embedding, head and whether they are tied, where they are quantized.

    `bitmill.runtime.hf.layer_formats` reads it.
    """
    groups: list[dict[str, Any]] = []
    for name, format in layers.items():
        described = format.to_dict()
        group = next((g for g in groups if g["format"] == described), None)
        if group is None:
            group = {"format": described, "layers": []}
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
