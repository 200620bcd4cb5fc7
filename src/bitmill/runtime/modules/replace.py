"""Replace the layers of a model by packed ones: linears, the table of embeddings and the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitmill.formats import Format
from bitmill.runtime.modules.embedding import QuantEmbedding, replace_embedding
from bitmill.runtime.modules.linear import replace_linear
from bitmill.runtime.modules.packed import PackedMatrix, shared_module
from bitmill.runtime.modules.patches import replace_patches

# As in config.json: "embedding" and "head" (paths, "" for none) and "tied" (bool).
EmbeddingAndHeadConfig = Mapping[str, Any]


def replace_layers(
    model: nn.Module,
    formats: Mapping[str, Format],
    ends: EmbeddingAndHeadConfig | None,
    places: Mapping[str, str],
    device: Any = None,
) -> dict[str, PackedMatrix]:
    """Replace layers by empty packed ones.

    Args:
        model: The model, changed in place.
        formats: Formats by the paths of the layers.
        ends: Embedding and head, if they are quantized. A tied head becomes a QuantLinear that uses the
            embedding's matrix; `formats` does not name it.
        places: Paths of the modules with shared parts, by layer; they are created if needed.
        device: Device of the packed tensors.

    Returns:
        The new layers by path, a tied head included.

    Raises:
        AttributeError: if the model does not have a layer.
        CheckpointError: if shared parts cannot be stored at their path.
    """
    replaced: dict[str, PackedMatrix] = {}
    for name, format in formats.items():
        if isinstance(model.get_submodule(name), nn.Embedding):
            replaced[name] = replace_embedding(model, name, format, device)
        elif isinstance(model.get_submodule(name), nn.Conv2d):
            replaced[name] = replace_patches(model, name, format, device)
        else:
            shared = shared_module(model, places[name], format, device) if name in places else None
            replaced[name] = replace_linear(model, name, format, device, shared=shared)
    if ends and ends["tied"]:
        table = replaced[ends["embedding"]]
        assert isinstance(table, QuantEmbedding)
        replaced[ends["head"]] = replace_linear(model, ends["head"], table.format, device, tied=table)
    for name in layers_outside_blocks(ends):
        replaced[name].outside_blocks = True
    return replaced


def layers_outside_blocks(ends: EmbeddingAndHeadConfig | None) -> tuple[str, ...]:
    """Return the paths of the quantized layers outside the blocks, a tied head included."""
    return tuple(ends[key] for key in ("embedding", "head") if ends[key]) if ends else ()
