"""Cross-layer equalization: balance the ranges on both sides of a seam.

Problem    one input column of large weights widens the range of every group that contains it
Equation   s_c = sqrt(r1_c / r2_c), r1 the largest |weight| that writes channel c, r2 the largest that reads it
           (a norm writes with its own weight)
Needs      weights only
Source     Nagel et al. 2019, "Data-Free Quantization" (arXiv 1906.04721), section 4.1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.transforms.base import TRANSFORMS, SeamTransform, SeamView


@TRANSFORMS.register("equalize")
@dataclass(frozen=True)
class Equalize(SeamTransform):
    """Square-root balancing; `strength` 0 leaves the model alone, 1 balances fully."""

    strength: float = 1.0

    def choose(self, seam: SeamView) -> Tensor:
        """Return s (channels,), normalised to geometric mean 1."""
        writes = seam.source.abs() if seam.source.dim() == 1 else seam.source.abs().amax(1)
        reads = seam.readers(torch.stack([t.abs().amax(0) for t in seam.targets]).amax(0)).amax(0)
        ratio = writes.clamp(min=1e-5) / reads.clamp(min=1e-5)
        scale = ratio.sqrt().pow(self.strength)
        return (scale / scale.log().mean().exp()).clamp(1e-3, 1e3)
