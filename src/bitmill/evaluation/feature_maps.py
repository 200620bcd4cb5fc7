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
_OTHER_TOKENS = 8  # at most, such as those of the class and registers


@torch.no_grad()
def patch_features(model: nn.Module, pictures: Tensor) -> Tensor | None:
    """Return the features of patches after the last block; None where they are no grid of the picture's shape.

    Args:
        model: a model of transformers.
        pictures: (pictures, channels, height, width).

    Returns:
        fp32 (pictures, rows, columns, width).
    """
    output: Any = model(pictures, output_hidden_states=True)
    hidden: Tensor = output.hidden_states[-1].float().cpu()
    size = (pictures.shape[-2], pictures.shape[-1])
    grid = patch_grid(hidden.shape[1], size, getattr(model.config, "patch_size", None))
    if hidden.dim() != 3 or grid is None:
        return None
    return hidden[:, -grid[0] * grid[1] :].unflatten(1, grid)


def patch_grid(tokens: int, size: tuple[int, int], patch: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return rows and columns of the patches among tokens, before which up to 8 others may stand; None without.

    Args:
        tokens: of a picture.
        size: height and width of the picture.
        patch: of the model, where it has one; models that merge patches have fewer.
    """
    height, width = size
    if patch:
        tall, wide = (patch, patch) if isinstance(patch, int) else patch
        if 0 <= tokens - (height // tall) * (width // wide) <= _OTHER_TOKENS:
            return height // tall, width // wide
    for others in range(min(_OTHER_TOKENS + 1, tokens)):
        rows = math.isqrt(round((tokens - others) * height / width))
        columns = (tokens - others) // rows if rows else 0
        if rows * columns == tokens - others and rows * width == columns * height:
            return rows, columns
    return None


class FeatureColours:
    """Colours of features: the first three principal components of one picture's patches.

    Args:
        features: of the float model, (rows, columns, width).
    """

    def __init__(self, features: Tensor) -> None:
        flat = features.flatten(0, 1)
        self._mean = flat.mean(0)
        self._axes = torch.linalg.svd(flat - self._mean, full_matrices=False).Vh[:_COLOURS]
        placed = (flat - self._mean) @ self._axes.T
        self._low, self._high = placed.aminmax(dim=0)

    def picture(self, features: Tensor) -> str:
        """Return features (rows, columns, width) of the float or of another model as a PNG file in a data URI."""
        placed = (features - self._mean) @ self._axes.T
        shares = (placed - self._low) / (self._high - self._low).clamp(min=1e-30)
        padded = nn.functional.pad(shares, (0, _COLOURS - shares.shape[-1]))
        return png(padded.nan_to_num().clamp(0, 1))


def patch_cosine(features: Tensor, reference: Tensor) -> float:
    """Return the mean cosine between the features (rows, columns, width) of a patch in two models."""
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
