"""OmniQuant: clipping and channel scales learned block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest
from bitmill.transforms import Transform
from bitmill.transforms.awq import AWQ
from bitmill.transforms.smooth import SmoothQuant
from bitmill.tuners.omniquant import OmniQuant


@METHODS.register("omniquant")
@dataclass(frozen=True)
class OmniQuantMethod(Method):
    """OmniQuant: learn clipped ranges and channel scales by the error of whole blocks.

    Problem    clipping and scales that are searched layer by layer ignore how the block transforms their errors
    Equation   range = [sigmoid(beta) min w, sigmoid(gamma) max w] a group, x / s and W s at every seam; beta,
               gamma and s by Adam on ||block(x; Q(W s)) - float block||^2, rounding passed straight through
    Needs      calibration text; the float model's hidden states in addition to the quantized ones
    Stored     an ordinary uniform grid; scales are folded away
    Cost       a forward and a backward pass over the calibration text an epoch, and a forward pass more
    Expect     below awq's error at 3 bits, from whose scales and clipped ranges it starts by default
    Limits     uniform grids; no scale between q and k; scales at the seams that the architecture has; the paper's
               thousands of steps from its own start (start=wide, scales=smoothquant) take too long on a CPU
    Paper      Shao et al. 2023 (arXiv 2308.13137)
    """

    bits: int = option(3, "bits of a code, 1 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    symmetric: bool = option(False, "fix the zero in the middle and store none")
    epochs: int = option(3, "passes over the calibration text, at most")
    lwc: bool = option(True, "learn where ranges are cut")
    let: bool = option(True, "learn channel scales")
    shift: bool = option(False, "learn channel shifts too, where norms have a bias")
    start: Literal["search", "wide"] = option("search", "where cuts start: 'search' or 'wide', as in the paper")
    scales: Literal["awq", "smoothquant", "none"] = option(
        "awq", "where channel scales start: 'awq', 'smoothquant', as in the paper, or 'none'"
    )
    lr_lwc: float = option(1e-1, "learning rate of the cuts; the paper's, for far more steps, is 0.01")
    lr_let: float = option(1e-2, "learning rate of scales and shifts; the paper's is 0.005")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform format, nearest solver, OmniQuant's tuner."""
        tuner = OmniQuant(self.epochs, self.lwc, self.let, self.shift, self.start, self.lr_lwc, self.lr_let)
        starts: dict[str, tuple[Transform, ...]] = {
            "awq": (AWQ(),),
            "smoothquant": (SmoothQuant(),),
            "none": (),
        }
        format = Uniform(self.bits, self.group_size, self.symmetric)
        return Recipe("omniquant", format, Nearest(), starts[self.scales], tuners=(tuner,))
