"""bitsandbytes' NF4, whose scales may be quantized a second time.

    weight                                  uint8 (out * in / 2, 1): two codes a byte, the first in the high half
    weight.absmax                           fp32, one for 64 weights, or uint8 where it is quantized again:
                                            nested_quant_map[absmax] * nested_absmax[absmax // 256] + nested_offset
    weight.quant_map                        the 16 quantiles
    weight.quant_state.bitsandbytes__nf4    JSON: blocksize, shape, nested_blocksize, nested_offset

Source: bitsandbytes/functional.py, QuantState and dequantize_4bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.normal_float import NormalFloat
from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer, checked, needed
from bitmill.imports.matrices import quantiles

_STATE = "weight.quant_state.bitsandbytes__nf4"


@IMPORTERS.register("bitsandbytes")
class BitsAndBytesImporter(Importer):
    """NF4 in blocks that end with a row."""

    name: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str] = "weight.absmax"
    reads: ClassVar[frozenset[str]] = frozenset(
        ("weight", "weight.absmax", "weight.quant_map", _STATE, "weight.nested_absmax", "weight.nested_quant_map")
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        kind = config.get("bnb_4bit_quant_type", "nf4") if config.get("load_in_4bit", True) else "int8"
        if kind != "nf4" or config.get("load_in_8bit"):
            raise SourceError(
                f"The bitsandbytes checkpoint holds {kind if kind != 'nf4' else 'int8'}; nf4 is read."
            )

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return absmax * quantile[code]."""
        weight, absmax, table, described = needed(
            tensors, layer, "weight", "weight.absmax", "weight.quant_map", _STATE
        )
        state = _state(layer, described)
        (rows, columns), block = state["shape"], state["blocksize"]
        if columns % block:
            raise SourceError(
                f"{layer!r} has blocks of {block} weights that cross its rows of {columns}, which no format holds."
            )
        if not torch.equal(table.float(), NormalFloat(4).table(torch.device("cpu")).values):
            raise SourceError(f"The levels of {layer!r} are not those of NF4.")
        packed = checked(layer, "weight", weight, tuple(weight.shape)).reshape(-1)
        if packed.numel() * 2 != rows * columns:
            raise SourceError(f"The codes of {layer!r} are not those of {rows} x {columns} weights.")
        codes = torch.stack([packed >> 4, packed & 15], -1).view(rows, columns)
        if "weight.nested_absmax" in tensors:
            levels, scales = needed(tensors, layer, "weight.nested_quant_map", "weight.nested_absmax")
            nested = scales.float().repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
            absmax = levels.float()[absmax.long()] * nested + float(state["nested_offset"])
        checked(layer, "weight.absmax", absmax, (rows * columns // block,))
        return quantiles(codes, absmax.view(rows, -1), 4, block)


def _state(layer: str, described: Tensor) -> dict[str, Any]:
    """Return the JSON of a layer. Raises SourceError where it is none, or tells no shape."""
    try:
        state = json.loads(bytes(described.tolist()))
        rows, columns = (int(side) for side in state["shape"])
        known = {**state, "shape": (rows, columns), "blocksize": int(state["blocksize"])}
        sound = rows > 0 and columns > 0 and known["blocksize"] > 0
    except (ValueError, KeyError, TypeError, OverflowError):
        sound = False
    if not sound:
        raise SourceError(f"The quant_state of {layer!r} is damaged; fetch the model again.")
    return known
