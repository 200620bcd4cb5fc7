"""NVIDIA ModelOpt's checkpoints of NVFP4 and FP8.

    NVFP4   weight uint8 (two codes a byte), weight_scale e4m3 (out, in / 16), weight_scale_2 fp32, a factor
    FP8     weight e4m3, weight_scale fp32

Source: vllm/model_executor/layers/quantization/modelopt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer, needed
from bitmill.imports.four_bits import nvfp4
from bitmill.imports.small_floats import fp8


@IMPORTERS.register("modelopt")
class ModelOptImporter(Importer):
    """E2M1 with two levels of scales, and floats of 8 bits with one."""

    name: ClassVar[str] = "modelopt"
    marker: ClassVar[str] = "weight_scale"
    reads: ClassVar[frozenset[str]] = frozenset(("weight", "weight_scale", "weight_scale_2"))
    passes_over: ClassVar[frozenset[str]] = frozenset(("input_scale", "k_scale", "v_scale"))

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return weight * weight_scale, times weight_scale_2 for NVFP4."""
        weight, scale = needed(tensors, layer, "weight", "weight_scale")
        if weight.dtype != torch.uint8:
            return fp8(layer, weight, scale)
        return nvfp4(layer, weight, scale, *needed(tensors, layer, "weight_scale_2"))

    def notes(self) -> list[str]:
        """Return that inputs are not rounded."""
        return ["The checkpoint rounds inputs; they are in float."]
