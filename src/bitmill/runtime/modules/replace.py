"""Put packed layers in the place of a model's own: linears, and the two ends of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitmill.formats import Format
from bitmill.runtime.modules.embedding import QuantEmbedding, replace_embedding
from bitmill.runtime.modules.linear import replace_linear
from bitmill.runtime.modules.packed import PackedMatrix, shared_module

EmbeddingAndHeadConfig = Mapping[
    str, Any
]  # as in config.json: `embedding` and `head` (paths, "" for none), `tied`


def replace_layers(
    model: nn.Module,
    formats: Mapping[str, Format],
    ends: EmbeddingAndHeadConfig | None,
    places: Mapping[str, str],
    device: Any = None,
) -> dict[str, PackedMatrix]:
    """Replace every layer that `formats` names by an empty packed one; returns them by name.

    ends: where tokens enter the model and leave it, if these are quantized. A tied head becomes a QuantLinear that
    reads the embedding's matrix; `formats` does not name it, and it is returned too.
    places: layer -> path of the module that holds what it shares, made where it is not there.
    Raises AttributeError for a layer that the model does not have, CheckpointError for a place that is none.
    """
    swapped: dict[str, PackedMatrix] = {}
    for name, format in formats.items():
        if isinstance(model.get_submodule(name), nn.Embedding):
            swapped[name] = replace_embedding(model, name, format, device)
        else:
            shared = shared_module(model, places[name], format, device) if name in places else None
            swapped[name] = replace_linear(model, name, format, device, shared=shared)
    if ends and ends["tied"]:
        table = swapped[ends["embedding"]]
        assert isinstance(table, QuantEmbedding)
        swapped[ends["head"]] = replace_linear(model, ends["head"], table.format, device, tied=table)
    for name in layers_outside_blocks(ends):
        swapped[name].outside_blocks = True
    return swapped


def layers_outside_blocks(ends: EmbeddingAndHeadConfig | None) -> tuple[str, ...]:
    """The quantized layers that lie outside the blocks, a tied head among them."""
    return tuple(ends[key] for key in ("embedding", "head") if ends[key]) if ends else ()
