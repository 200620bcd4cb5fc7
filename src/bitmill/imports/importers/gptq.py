"""GPTQ's checkpoints, as GPTQModel, AutoGPTQ and auto-round write them; see `exports.targets.gptq` for the bytes.

Version 1 (`checkpoint_format` "gptq") stores zeros less one. With `desc_act` the columns of a group are not
neighbours: `g_idx` has the group of each, and the matrix is stored with its columns sorted by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer, checked, needed
from bitmill.imports.matrices import group_order, in_order
from bitmill.numerics.packing import unpack, words_for

_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zeros
_BITS = (2, 3, 4, 8)


@IMPORTERS.register("gptq")
class GPTQImporter(Importer):
    """Integers of 2, 3, 4 or 8 bits, packed along the inputs."""

    name: ClassVar[str] = "gptq"
    marker: ClassVar[str] = "qweight"
    reads: ClassVar[frozenset[str]] = frozenset(("qweight", "qzeros", "scales", "g_idx"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if version not in _VERSIONS:
            raise SourceError(f"The GPTQ checkpoint has the format {version!r}; gptq and gptq_v2 are read.")
        if config.get("dynamic"):
            raise SourceError("The GPTQ checkpoint has bits by layer (dynamic), which are not read yet.")
        self.added = _VERSIONS[version]

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return scales * (qweight - qzeros), with columns sorted by group where they are not in order."""
        qweight, qzeros, scales = needed(tensors, layer, "qweight", "qzeros", "scales")
        bits, groups, index = int(self.config.get("bits", 4)), scales.shape[0], tensors.get("g_idx")
        if bits not in _BITS:
            raise SourceError(f"The GPTQ checkpoint has codes of {bits} bits; 2, 3, 4 and 8 are read.")
        shape = qweight.shape[1], qweight.shape[0] * 32 // bits if index is None else index.shape[0]
        checked(layer, "qweight", qweight, (words_for(shape[1], bits), shape[0]))
        checked(layer, "qzeros", qzeros, (groups, words_for(shape[0], bits)))
        checked(layer, "scales", scales, (groups, shape[0]))
        codes = unpack(qweight.T.contiguous(), bits, shape[1])
        zero = unpack(qzeros, bits, shape[0]).to(torch.int32).T + self.added
        stated = int(self.config.get("group_size", -1))
        group = stated if stated > 0 else None
        order = None if index is None else group_order(layer, "g_idx", index, (shape[1], groups), group)
        return in_order(order, codes, scales.T, zero.contiguous(), bits, group)
