"""Refuse weights that their format or type cannot store, before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.errors import NumericsError
from bitmill.formats import Format
from bitmill.formats.range import range_reason


def check_range(layer: str, W: Tensor, format: Format) -> None:
    """Check that a format stores the magnitudes of a layer's weights.

    Args:
        layer: full name of the layer.
        W: its weight (out, in), after all transforms.
        format: of the layer.

    Raises:
        NumericsError: weights would saturate or vanish.
    """
    if reason := range_reason(format, W):
        raise NumericsError(
            f"The weights of {layer} {reason}; keep it in float (--rule '{layer}=float'), or choose a format with "
            "wider scales, such as microscaling or nvfp4."
        )


def to_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that stays in float, changed by transforms or tuners, in its stored type.

    Raises:
        NumericsError: numbers would become infinite.
    """
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            f"{name} reaches {float(tensor.abs().amax()):.3g} after its transforms, beyond {dtype}, in which it "
            "is stored; leave out the transform, or convert the model to bfloat16 or float32 first."
        )
    return stored
