"""AWQ: scale important channels up before rounding, and back down in the layer before.

Problem    one percent of the weights, those that read channels of large magnitude, carry most of the output error;
           storing them in float needs mixed storage, scaling their columns up makes their rounding finer for free
Equation   s_c = a_c^r / sqrt(max_c a_c^r min_c a_c^r), a_c = mean|x_c|; of r = 0, 1/grid, 2/grid, ... the one
           with the least sum over the seam's targets of tr(D G D^T), D = W - Q(W s) / s, G = X^T X / tokens
Needs      calibration text
Source     Lin et al. 2023, "AWQ" (arXiv 2306.00978), section 3.2; the grid is that of the authors' code

The authors run the parent module, all of attention or of the MLP, for every r and compare its outputs. The
error of the targets' own outputs needs only the Gram matrix: exact over all calibration tokens instead of a
sample of them, independent of their number, and of the architecture. It ignores that
the parent tolerates some errors more than others (those of q and k pass a softmax).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.transforms.base import TRANSFORMS, SeamTransform, SeamView

_FLOOR = 1e-4  # of a^r


@TRANSFORMS.register("awq")
@dataclass(frozen=True)
class AWQ(SeamTransform):
    """Scale search at every seam; never worse than no scale on the calibration text.

    Weights are rounded as the nearest solver does it.  grid: exponents tried, from 0 on.  search: with the
    format's parameter search, as many times as there are exponents, instead of its closed-form start.
    """

    grid: int = 20
    search: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1:
            raise RecipeError(f"grid is {self.grid!r}; use 1 or more.")

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the layers' inputs."""
        return frozenset({"activations"})

    def choose(self, seam: SeamView) -> Tensor:
        """Return s (channels,)."""
        gram = seam.stats.required_gram(self.name)
        magnitude = seam.readers(seam.stats.required_mean_abs(self.name)).mean(0)
        magnitude = magnitude / magnitude.mean().clamp(min=1e-30)
        best, least = torch.ones_like(magnitude), torch.tensor(torch.inf)
        for step in range(self.grid):
            scale = magnitude.pow(step / self.grid).clamp(min=_FLOOR)
            scale = scale / (scale.amax() * scale.amin()).sqrt()
            columns = seam.columns(scale)
            errors = [self._error(W, columns, gram, seam.format) for W in seam.targets]
            error = torch.stack(errors).sum()
            if error < least:
                best, least = scale, error
        return best

    def _error(self, W: Tensor, scale: Tensor, gram: Tensor, format: GroupFormat) -> Tensor:
        """Return tr(D G D^T) of W (rows, columns), rounded after its columns are multiplied by `scale`."""
        scaled = W * scale
        params = fit_matrix(format, scaled, None, self.search)
        D = W - nearest_matrix(format, scaled, params).dequantize() / scale
        return (D @ gram).mul_(D).sum()
