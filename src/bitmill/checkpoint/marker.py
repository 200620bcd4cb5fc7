"""Empty tensors under the names of the weights that were quantized.

Without bitmill transformers ignores how a folder is quantized: it would build the float model, find no
`L.weight`, and draw that weight at random. An empty tensor of that name, which fits no layer, makes it raise an
error instead. Its shape (0, out, in) also records the shape of the layer, where no report does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bitmill.errors import CheckpointError
from bitmill.sources.safetensors_header import TensorEntry

WEIGHT = "weight"


def weight_marker(shape: tuple[int, int]) -> Tensor:
    """Return the empty tensor of a layer of `shape` (out, in).

    It has memory of its own, because savers look for tensors that share memory.
    """
    return torch.empty(1, dtype=torch.float16)[:0].view(0, *shape)


def marked_shape(layer: str, entries: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
    """Return the shape of a layer by its empty weight, None in folders of earlier versions.

    Raises:
        CheckpointError: the layer has a weight that is not empty.
    """
    entry = entries.get(f"{layer}.{WEIGHT}")
    if entry is None:
        return None
    if len(entry.shape) != 3 or entry.shape[0] != 0 or 0 in entry.shape[1:]:
        raise CheckpointError(
            f"The tensor '{layer}.{WEIGHT}' has the shape {entry.shape}, but the layer is quantized; "
            "the folder is damaged, quantize again."
        )
    return entry.shape[1], entry.shape[2]


def marker_names(layers: Iterable[str]) -> set[str]:
    """Return the names of the empty weights of layers."""
    return {f"{layer}.{WEIGHT}" for layer in layers}
