"""What config.json says about a quantized model."""

from __future__ import annotations

from typing import Any

from bitmill.formats import Format
from bitmill.runtime.hf import FORMAT_VERSION, QUANT_METHOD
from bitmill.version import __version__


def quantization_config(
    layers: dict[str, Format],
    recipe: dict[str, Any],
    places: dict[str, str] | None = None,
    ends: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json: formats, each with the layers that use it, and the recipe.

    places: layer -> where what it shares is.  ends: embedding, head and whether they are tied, where they are
    quantized.  `layer_formats`, `layer_places` and `quantized_ends` of `bitmill.runtime.hf` read it.
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
