"""SmoothQuant: move the magnitude of activations into the weights that read them.

Problem    a few input channels are far larger than the rest, so that one scale for a token's activations
           leaves the others a handful of levels; weights have no such channels
Equation   s_c = max|x_c|^alpha / max|w_c|^(1 - alpha), over all tokens and over all rows that read channel c
Needs      calibration text
Source     Xiao et al. 2022, "SmoothQuant" (arXiv 2211.10438), section 4

The paper scales behind norms only. Here every seam is scaled; a linear source absorbs 1/s in its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.transforms.base import TRANSFORMS, SeamTransform, SeamView

_FLOOR = 1e-5  # of a maximum: channels that are silent, or that nobody reads


@TRANSFORMS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(SeamTransform):
    """Balance activations and weights; `alpha` 0 equalizes the weights alone, 1 the activations alone."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha!r}; use 0 to 1.")

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the layers' inputs."""
        return frozenset({"activations"})

    def choose(self, seam: SeamView) -> Tensor:
        """Return s (channels,)."""
        inputs = seam.readers(seam.stats.required_max_abs(self.name)).amax(0).clamp(min=_FLOOR)
        weights = torch.stack([W.abs().amax(0) for W in seam.targets]).amax(0)
        weights = seam.readers(weights).amax(0).clamp(min=_FLOOR)
        return (inputs**self.alpha / weights ** (1 - self.alpha)).clamp(min=_FLOOR)
