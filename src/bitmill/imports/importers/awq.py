"""AWQ's checkpoints (gemm), as AutoAWQ and llm-awq write them; see `exports.targets.awq` for the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer, checked, needed
from bitmill.imports.matrices import evenly_spaced
from bitmill.numerics.packing import unpack

_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device="cpu")  # the nibble of each of eight outputs
_BITS = 4


@IMPORTERS.register("awq")
class AWQImporter(Importer):
    """Integers of 4 bits with zeros, packed along the outputs."""

    name: ClassVar[str] = "awq"
    marker: ClassVar[str] = "qweight"
    reads: ClassVar[frozenset[str]] = frozenset(("qweight", "qzeros", "scales"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", _BITS))
        if version != "gemm" or str(bits) != str(_BITS):
            raise SourceError(f"The AWQ checkpoint has the version {version!r} of {bits} bits; gemm of 4 is read.")

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return scales * (qweight - qzeros)."""
        qweight, scales = needed(tensors, layer, "qweight", "scales")
        groups, zero, shape = scales.shape[0], None, (qweight.shape[1] * 8, qweight.shape[0])
        checked(layer, "scales", scales, (groups, shape[0]))
        if "qzeros" in tensors:
            zero = _unpacked(checked(layer, "qzeros", tensors["qzeros"], (groups, shape[0] // 8)))
            zero = zero.T.to(torch.int32)
        stated = int(self.config.get("group_size", self.config.get("q_group_size", -1)))
        group = stated if stated > 0 else None
        return evenly_spaced(_unpacked(qweight).T.contiguous(), scales.T, zero, _BITS, group)


def _unpacked(words: Tensor) -> Tensor:
    """Return the codes of packed words, uint8 (rows, outputs)."""
    values = unpack(words.contiguous(), _BITS, words.shape[1] * 8).view(words.shape[0], -1, 8)
    return values[..., _PLACES].flatten(1)
