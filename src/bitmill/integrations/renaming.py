"""Folders whose layers have the names of another release of transformers than the one that loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bitmill.checkpoint.marker import marker_names
from bitmill.models.stored import renamed_layers
from bitmill.runtime.modules.replace import layers_outside_blocks
from bitmill.sources.safetensors_header import read_header


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


def has_own_names(model: nn.Module, layers: Iterable[str], files: Iterable[Path]) -> bool:
    """Return True if every stored tensor has its name in the model, so that nothing is to be renamed.

    Args:
        model: the model with packed layers.
        layers: the packed layers, whose empty weights are no tensors of the model.
        files: the safetensors files.
    """
    known = {*model.state_dict(), *marker_names(layers)}
    return all(name in known for file in files for name in read_header(file))
