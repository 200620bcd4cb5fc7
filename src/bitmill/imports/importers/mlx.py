"""MLX's checkpoints (affine), as mlx-lm writes them; see `exports.targets.mlx` for the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer, checked, needed
from bitmill.imports.matrices import with_offset
from bitmill.numerics.packing import unpack, words_for


@IMPORTERS.register("mlx")
class MLXImporter(Importer):
    """Codes of 2 to 8 bits with a scale and a bias for 32, 64 or 128 columns."""

    name: ClassVar[str] = "mlx"
    marker: ClassVar[str] = "scales"
    reads: ClassVar[frozenset[str]] = frozenset(("weight", "scales", "biases"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if (mode := config.get("mode", "affine")) != "affine":
            raise SourceError(f"The MLX checkpoint has the mode {mode!r}; affine is read.")

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return scales * code + biases."""
        weight, scales, biases = needed(tensors, layer, "weight", "scales", "biases")
        own = self.config.get(layer)
        chosen = {**self.config, **own} if isinstance(own, dict) else self.config
        if (mode := chosen.get("mode", "affine")) != "affine":
            raise SourceError(f"it has the mode {mode!r}; affine is read.")
        bits, group = int(chosen.get("bits", 4)), int(chosen.get("group_size", 64))
        rows, groups = scales.shape
        words = checked(layer, "weight", weight, (rows, words_for(groups * group, bits))).view(torch.int32)
        checked(layer, "biases", biases, (rows, groups))
        return with_offset(unpack(words, bits, groups * group), scales, biases, bits, group)
