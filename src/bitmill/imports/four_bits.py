"""Matrices of E2M1 numbers in bytes, the first of two in the low half: NVFP4 and MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.float import Float
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.nvfp4 import NVFP4
from bitmill.formats.quantized import Quantized
from bitmill.imports.base import checked
from bitmill.imports.matrices import nibbles
from bitmill.numerics.minifloat import ELEMENTS

_NVFP4_GROUP, _MXFP4_GROUP, _NAN = 16, 32, 255
_E4M3_NAN = 127


def nvfp4(
    layer: str, packed: Tensor, scale: Tensor, multiplier: Tensor | None = None, divisor: Tensor | None = None
) -> Quantized:
    """Return e2m1(code) * e4m3(scale) * multiplier, or with a divisor e2m1(code) * (e4m3(scale) / divisor).

    Scales divided by a number may be no products with another one in fp32; they are stored in fp32 then.

    Args:
        layer: for messages.
        packed: uint8 (rows, columns / 2).
        scale: float8_e4m3fn (rows, columns / 16).
        multiplier, divisor: one number; either of them.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    checked(layer, "weight_scale", scale, (rows, -(-columns // _NVFP4_GROUP)))
    numbers = scale.view(torch.uint8)
    if bool((numbers & _E4M3_NAN == _E4M3_NAN).any()):
        raise SourceError(f"A scale of {layer!r} is NaN; fetch the model again.")
    tensor_scale: Tensor | None
    codes, params = nibbles(packed), {"scale": numbers.float()}
    values = ELEMENTS["e4m3"].values()[numbers.long()]
    if multiplier is not None:
        number = multiplier.float().reshape(1, 1)
        factors, tensor_scale = values * number, number
    else:
        assert divisor is not None
        factors = values / divisor.float().reshape(1, 1)
        tensor_scale = _as_multiplier(values, factors, divisor.float().reshape(1, 1))
    if not bool(torch.isfinite(factors).all()):
        raise SourceError(f"The scale of the tensor {layer!r} is NaN or infinite; fetch the model again.")
    if tensor_scale is None:
        format = Float(4, _NVFP4_GROUP, "e2m1", "float32")
        return Quantized(format, codes, {"scale": factors}, (rows, columns))
    return Quantized(NVFP4(4), codes, {**params, "tensor_scale": tensor_scale}, (rows, columns))


def _as_multiplier(values: Tensor, factors: Tensor, divisor: Tensor) -> Tensor | None:
    """Return a number by which values are multiplied to get factors, each rounded to fp32; None without one."""
    inverse = 1 / divisor
    for number in (inverse, torch.nextafter(inverse, inverse * 2), torch.nextafter(inverse, inverse * 0)):
        if torch.equal(values * number, factors):
            return number
    return None


def mxfp4(layer: str, packed: Tensor, scale: Tensor) -> Quantized:
    """Return e2m1(code) * 2**(scale - 127).

    Args:
        layer: for messages.
        packed: uint8 (rows, columns / 2).
        scale: uint8 (rows, columns / 32).
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    numbers = checked(layer, "weight_scale", scale, (rows, -(-columns // _MXFP4_GROUP))).view(torch.uint8)
    if bool((numbers == _NAN).any()):
        raise SourceError(f"A scale of {layer!r} is NaN; fetch the model again.")
    return Quantized(Microscaling(4), nibbles(packed), {"scale": numbers.float()}, (rows, columns))
