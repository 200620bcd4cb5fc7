"""Feature maps of a vision model as pictures: the principal components of the features of patches as colours."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bitmill.errors import CalibrationError

_COLOURS = 3


@torch.no_grad()
def patch_features(model: nn.Module, pictures: Tensor) -> Tensor | None:
    """Return the features of patches after the last block; None where patches are no square.

    Args:
        model: a model of transformers.
        pictures: (pictures, channels, height, width).

    Returns:
        fp32 (pictures, side, side, width).
    """
    output: Any = model(pictures, output_hidden_states=True)
    hidden: Tensor = output.hidden_states[-1].float().cpu()
    side = math.isqrt(hidden.shape[1])  # further tokens, such as that of the class, come first
    if hidden.dim() != 3 or hidden.shape[1] - side * side > 8:
        return None
    return hidden[:, -side * side :].unflatten(1, (side, side))


class FeatureColours:
    """Colours of features: the first three principal components of one picture's patches.

    Args:
        features: of the float model, (side, side, width).
    """

    def __init__(self, features: Tensor) -> None:
        flat = features.flatten(0, 1)
        self._mean = flat.mean(0)
        self._axes = torch.linalg.svd(flat - self._mean, full_matrices=False).Vh[:_COLOURS]
        placed = (flat - self._mean) @ self._axes.T
        self._low, self._high = placed.aminmax(dim=0)

    def picture(self, features: Tensor) -> str:
        """Return features (side, side, width) of the float or of another model as a PNG file in a data URI."""
        placed = (features - self._mean) @ self._axes.T
        shares = (placed - self._low) / (self._high - self._low).clamp(min=1e-30)
        padded = nn.functional.pad(shares, (0, _COLOURS - shares.shape[-1]))
        return png(padded.nan_to_num().clamp(0, 1))


def patch_cosine(features: Tensor, reference: Tensor) -> float:
    """Return the mean cosine between the features (side, side, width) of a patch in two models."""
    return float(cosine_similarity(features, reference, dim=-1).mean().nan_to_num())


def shown_picture(pixels: Tensor) -> str:
    """Return a picture as a model reads it, (channels, height, width), as a PNG file in a data URI."""
    low, high = pixels.aminmax()
    shares = ((pixels - low) / (high - low).clamp(min=1e-30)).movedim(0, -1)
    return png(shares[..., [0, 0, 0]] if shares.shape[-1] < _COLOURS else shares[..., :_COLOURS])


def png(shares: Tensor) -> str:
    """Return shares of red, green and blue (height, width, 3) as a PNG file in a data URI."""
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("Pictures are written with Pillow; install bitmill[vision].") from None
    file = io.BytesIO()
    Image.fromarray((shares * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
