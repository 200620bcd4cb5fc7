"""AWQ's checkpoints (gemm), as vLLM, SGLang and transformers read them.

    qweight  int32 (in, out / 8): eight codes of 4 bits along the outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   int32 (in / g, out / 8): zeros, in that order
    scales   fp16 (in / g, out)

Source: gptqmodel/nn_modules/qlinear/gemm_awq.py; vllm/model_executor/layers/quantization/auto_awq.py.
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
)
from bitmill.formats.quantized import Quantized
from bitmill.numerics.packing import pack, unpack

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of each nibble, lowest bits first
_BITS = 4


@TARGETS.register("awq")
class AWQTarget(OneGridTarget):
    """Integers of 4 bits with zeros."""

    name: ClassVar[str] = "awq"
    readers: ClassVar[str] = "vLLM, SGLang, and transformers with gptqmodel"

    def unsupported_reason(self, layer: Layer) -> str | None:
        """Return why AWQ cannot hold a layer."""
        found = grid(layer)
        if isinstance(found, str):
            return found
        if found.bits != _BITS:
            return f"it has {found.bits} bits, and awq holds 4; use --to gptq or compressed-tensors"
        if layer.shape[0] % 8:
            return f"it has {layer.shape[0]} outputs, and awq needs a multiple of 8; use --to compressed-tensors"
        return None

    def tensors(self, quantized: Quantized) -> dict[str, Tensor]:
        """Return qweight, qzeros and scales."""
        matrix = integers(quantized)
        return {
            "qweight": _packed(matrix.codes.T),
            "qzeros": _packed(matrix.zero.T),
            "scales": matrix.scale.T.contiguous(),
        }

    def decode(self, tensors: dict[str, Tensor], layer: Layer) -> Tensor:
        """Return scales * (qweight - qzeros)."""
        codes, zero = (_unpacked(tensors[name]).T.contiguous() for name in ("qweight", "qzeros"))
        return decode_integers(Integers(codes, tensors["scales"].T, zero.to(torch.int32)))

    def config(self, layers: Mapping[str, Layer], floats: Sequence[str]) -> dict[str, Any]:
        """Return the config; layers that stay in float are excluded by name."""
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": common_group(layers),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(floats) or None,
        }


def _packed(values: Tensor) -> Tensor:
    """Pack integers (rows, columns) of 4 bits along the columns."""
    eights = values.contiguous().view(values.shape[0], -1, 8)[..., _ORDER]
    return pack(eights.flatten(1), _BITS)


def _unpacked(words: Tensor) -> Tensor:
    values = unpack(words, _BITS, words.shape[1] * 8).view(words.shape[0], -1, 8)
    return values[..., torch.tensor(_ORDER).argsort()].flatten(1)
