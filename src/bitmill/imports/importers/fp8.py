"""8-bit floats as transformers and DeepSeek store them: weight e4m3, and a scale for blocks of 128 by 128.

    weight             float8_e4m3fn (out, in)
    weight_scale_inv   fp32 (out / 128, in / 128), which multiplies

Source: transformers/quantizers/quantizer_finegrained_fp8.py; vllm/model_executor/layers/quantization/fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer, needed
from bitmill.imports.small_floats import fp8


@IMPORTERS.register("fp8")
class FP8Importer(Importer):
    """Floats of 8 bits with a scale for a block."""

    name: ClassVar[str] = "fp8"
    marker: ClassVar[str] = "weight_scale_inv"
    reads: ClassVar[frozenset[str]] = frozenset(("weight", "weight_scale_inv"))
    passes_over: ClassVar[frozenset[str]] = frozenset(("input_scale", "activation_scale"))

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return weight * weight_scale_inv."""
        weight, scale = needed(tensors, layer, "weight", "weight_scale_inv")
        return fp8(layer, weight, scale, self.config.get("weight_block_size") or (128, 128))

    def notes(self) -> list[str]:
        """Return that inputs are not rounded."""
        return ["The checkpoint rounds inputs to 8 bits; they are in float."]
