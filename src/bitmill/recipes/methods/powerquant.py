"""PowerQuant: evenly spaced levels of a power of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.power import Power
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest


@METHODS.register("powerquant")
@dataclass(frozen=True)
class PowerQuant(Method):
    """PowerQuant: |w|^a on an even grid, the exponent a searched without data.

    Problem    weights are bell-shaped, evenly spaced levels are not; the powers are the maps that keep products
    Equation   W^ = scale sign(q) (|q| / 2^(bits - 1))^(1 / a),  q from -2^(bits - 1) to 2^(bits - 1) - 1
    Symbols    a exponent, near 0.5 for bell shapes; 1 is the uniform grid
    Search     a in steps of 1/16 (of the network 1/32), each with a few scales, for the least squared error of a
               row, a sample of the layer or of all layers
    Stored     codes, fp16 a group; 8 bits a layer or row for a that is not the network's
    Needs      nothing: no text, no forward pass; solver=gptq calibration text
    Cost       seconds to minutes
    Expect     below the error of a symmetric uniform grid of equal groups
    Limits     weights alone: for inputs see --inputs power. The authors round |w|^a, here w is rounded to the
               nearest level, whose error is smaller
    Paper      Yvinec et al. 2023 (arXiv 2301.09858); exponents of layers: NUPES (arXiv 2308.05600)
    """

    bits: int = option(4, "bits of a code, 2 to 8")
    group_size: GroupSize = option(64, "input columns that share a scale, or 'row' or 'tensor'")
    per: Literal["network", "layer", "row"] = option("layer", "what has an exponent of its own")
    exponent: float = option(0.0, "exponent of the network, with per=network; 0 for that of least error")
    solver: Literal["nearest", "gptq"] = option("nearest", "how weights are rounded")

    def recipe(self) -> Recipe:
        """Return a recipe: format of powers, nearest or GPTQ solver."""
        solver: Solver = GPTQ() if self.solver == "gptq" else Nearest(search=True)
        return Recipe("powerquant", Power(self.bits, self.group_size, self.exponent, self.per), solver)
