"""SmoothQuant: move the magnitude of activations into the weights that read them.

Problem    a few input channels are far larger than the rest, so that one scale for a token's activations
           leaves the others a handful of levels; weights have no such channels
Equation   s_c = max|x_c|^alpha / max|w_c|^(1 - alpha), over all tokens and over all rows that read channel c
Needs      calibration text
Source     Xiao et al. 2022, "SmoothQuant" (arXiv 2211.10438), section 4

The paper scales behind norms only. Here every seam is scaled; a linear source absorbs 1/s in its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.transforms.base import TRANSFORMS, SeamTransform, SeamView

_PEAK = 3.0  # times its mean magnitude: the largest input of a usual token
_STEPS = 20  # between an alpha of 0 and 1
_FLOOR = 1e-5  # of a maximum: channels that are silent, or that nobody reads


@TRANSFORMS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(SeamTransform):
    """Balance activations and weights; `alpha` 0 equalizes the weights alone, 1 the activations alone.

    With `search` each seam has the one of 21 that leaves least error in its layers' outputs, where inputs are
    rounded to `input_bits` bits with a step for the largest of them, and weights to those of their format with one
    a row.
    """

    alpha: float = 0.5
    search: bool = False
    input_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha!r}; use 0 to 1.")
        if not 2 <= self.input_bits <= 16:
            raise RecipeError(f"input_bits is {self.input_bits!r}; use 2 to 16.")

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the layers' inputs."""
        return frozenset({"activations"})

    def choose(self, seam: SeamView) -> Tensor:
        """Return s (channels,)."""
        largest = seam.stats.required_max_abs(self.name)
        if not self.search:
            return self._scale(seam, largest, self.alpha)
        usual = seam.stats.required_mean_abs(self.name)
        scales = [self._scale(seam, size, k / _STEPS) for size in (largest, usual) for k in range(_STEPS + 1)]
        return min(scales, key=lambda scale: self._expected_error(seam, usual, seam.columns(scale)))

    def _scale(self, seam: SeamView, size: Tensor, alpha: float) -> Tensor:
        """Return s (channels,) for the sizes of the inputs (columns,)."""
        inputs = seam.readers(size).amax(0).clamp(min=_FLOOR)
        weights = torch.stack([W.abs().amax(0) for W in seam.targets]).amax(0)
        weights = seam.readers(weights).amax(0).clamp(min=_FLOOR)
        return (inputs**alpha / weights ** (1 - alpha)).clamp(min=_FLOOR)

    def _expected_error(self, seam: SeamView, usual: Tensor, scale: Tensor) -> float:
        """Return the error of the outputs, up to a factor, after scaling the columns (columns,).

        A step Delta rounds with the variance Delta^2 / 12. A token's step follows from its largest input, taken as
        some times the largest mean magnitude, which one token with very large inputs moves little; its errors meet
        the squares of the weights. The weights' steps follow from the largest of a row, and their errors meet the
        mean squares of normal inputs of these magnitudes.
        """
        inputs = _PEAK * (usual / scale).amax() / (1 << self.input_bits)
        power = math.pi / 2 * (usual / scale).square().sum()
        error = 0.0
        for W in seam.targets:
            scaled = W * scale
            steps = scaled.abs().amax(1) / (1 << seam.format.bits)
            error += float(inputs.square() * scaled.square().sum() + steps.square().sum() * power)
        return error
