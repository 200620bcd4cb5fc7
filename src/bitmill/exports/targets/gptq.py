"""GPTQ's checkpoints, as GPTQModel, transformers, vLLM and SGLang read them.

Of a linear layer (out, in) with groups of g columns, all along the transposed matrix:

    qweight  int32 (in * bits / 32, out): codes packed along the inputs, the first in the lowest bits
    qzeros   int32 (in / g, out * bits / 32): zeros packed along the outputs, less one in version 1 (format "gptq")
    scales   fp16 (in / g, out)
    g_idx    int32 (in): the group of each input

Symmetric codes are written in version 1, which every reader knows, all others in version 2, where zeros are as
they are.

Source: gptqmodel/nn_modules/qlinear/__init__.py, `pack_block`; gptqmodel/utils/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.exports.base import TARGETS, Layer
from bitmill.exports.integers import (
    Integers,
    OneGridTarget,
    common_group,
    decode_integers,
    grid,
    integers,
    known_grid,
)
from bitmill.formats.quantized import Quantized
from bitmill.numerics.packing import pack, unpack
from bitmill.version import __version__

_BITS = (2, 3, 4, 8)


@TARGETS.register("gptq")
class GPTQTarget(OneGridTarget):
    """Integers of 2, 3, 4 or 8 bits."""

    name: ClassVar[str] = "gptq"
    readers: ClassVar[str] = "vLLM, SGLang, and transformers with gptqmodel"

    def unsupported_reason(self, layer: Layer) -> str | None:
        """Return why GPTQ cannot hold a layer."""
        found = grid(layer)
        if isinstance(found, str):
            return found
        if found.bits not in _BITS:
            return f"it has {found.bits} bits, and gptq holds 2, 3, 4 and 8; use --to compressed-tensors"
        if any(side % 32 for side in layer.shape):
            return f"its shape {layer.shape} is no multiple of 32; use --to compressed-tensors"
        return None

    def notes(self, layers: Mapping[str, Layer]) -> list[str]:
        """Return which engines read such codes."""
        found = known_grid(next(iter(layers.values())))
        if found.symmetric and found.bits in (4, 8):
            return []
        return [
            "vLLM and SGLang read symmetric gptq codes of 4 and 8 bits alone (quantize with symmetric=true); for "
            "others use --to compressed-tensors."
        ]

    def tensors(self, quantized: Quantized) -> dict[str, Tensor]:
        """Return qweight, qzeros, scales and g_idx."""
        matrix, found = integers(quantized), known_grid(Layer(quantized.format, quantized.shape))
        zeros = matrix.zero.T - (1 if found.symmetric else 0)
        return {
            "qweight": pack(matrix.codes, found.bits).T.contiguous(),
            "qzeros": pack(zeros.contiguous(), found.bits),
            "scales": matrix.scale.T.contiguous(),
            "g_idx": (torch.arange(found.columns) // found.group).to(torch.int32),
        }

    def decode(self, tensors: dict[str, Tensor], layer: Layer) -> Tensor:
        """Return scales * (qweight - qzeros)."""
        found = known_grid(layer)
        codes = unpack(tensors["qweight"].T.contiguous(), found.bits, layer.shape[1])
        zeros = unpack(tensors["qzeros"], found.bits, layer.shape[0]).to(torch.int32).T
        zero = zeros + (1 if found.symmetric else 0)
        return decode_integers(Integers(codes, tensors["scales"].T, zero))

    def config(self, layers: Mapping[str, Layer], floats: Sequence[str]) -> dict[str, Any]:
        """Return the config; layers that stay in float are excluded by name."""
        found = known_grid(next(iter(layers.values())))
        version = "gptq" if found.symmetric else "gptq_v2"
        return {
            "quant_method": "gptq",
            "bits": found.bits,
            "group_size": common_group(layers),
            "desc_act": False,
            "sym": found.symmetric,
            "lm_head": False,
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            "true_sequential": True,
            "dynamic": {f"-:^{_escaped(name)}$": {} for name in floats if name.count(".") > 1},
            "meta": {"quantizer": [f"bitmill:{__version__}"]},
        }

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return quantize_config.json, which older readers open."""
        return {"quantize_config.json": config}


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
