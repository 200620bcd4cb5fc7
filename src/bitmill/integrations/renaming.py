"""Folders whose layers have the names of another release of transformers than the one that loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitmill.models.stored import renamed_layers
from bitmill.runtime.modules.replace import layers_outside_blocks


def model_names(model: nn.Module, config: Mapping[str, Any]) -> dict[str, str]:
    """Return layer in a `quantization_config` -> layer in the model.

    Args:
        model: the float model.
        config: a sound `quantization_config`.
    """
    layers = [layer for group in config["groups"] for layer in group["layers"]]
    return renamed_layers(model, [*layers, *layers_outside_blocks(config.get("ends"))])


def renamed_config(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a `quantization_config` with other names of its layers.

    Args:
        config: the config.
        names: layer -> its other name.
    """
    groups = [{**group, "layers": [names[layer] for layer in group["layers"]]} for group in config["groups"]]
    renamed = {**config, "groups": groups}
    if ends := config.get("ends"):
        renamed["ends"] = {key: names.get(value, value) for key, value in ends.items()}
    return renamed
