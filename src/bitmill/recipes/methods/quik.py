"""QUIK: 4-bit weights and activations around a few float columns."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats import Format
from bitmill.formats.outlier_columns import OutlierColumns
from bitmill.formats.rotated import Rotated
from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule
from bitmill.solvers.gptq import GPTQ

_DOWN = ("*.down_proj", "*.fc2", "*.mlp.c_proj", "*.dense_4h_to_h")


@METHODS.register("quik")
@dataclass(frozen=True)
class QUIK(Method):
    """QUIK: 4-bit integers times 4-bit integers, with the columns of largest inputs in float.

    Problem    prompts are bound by arithmetic; at 4 bits one scale a token breaks on the few channels that are
               far larger than the rest
    Equation   y = x[outliers] V^T + s_x s_w ((q_x - z_x) q_w^T), GPTQ's error flowing into V
    Stored     codes, scales, fp16 V and the places of the outliers
    Needs      the Gram matrix and the magnitudes of every layer's inputs (calibration text)
    Cost       gptq's
    Expect     usable 4-bit products; the input of the second MLP layer, a product of two others, takes 8 bits
    Limits     that layer is found by its name: *.down_proj, *.fc2, *.mlp.c_proj, *.dense_4h_to_h; where it has
               another one, add a rule for it
    Paper      Ashkboos et al. 2023 (arXiv 2310.09259)
    """

    bits: int = option(4, "bits of weights and inputs, 2 to 8")
    columns: int = option(64, "columns of a layer that stay in float; 0 for none")
    group_size: GroupSize = option("row", "input columns that share a scale of weights, or 'row'")
    input_group: GroupSize = option("row", "inputs that share a scale: columns of a token, 'row' for a token")
    down_bits: int = option(8, "bits of weights and inputs of the second MLP layer, 2 to 8")
    rotate: bool = option(False, "turn the inputs between the outliers by a Hadamard matrix (not in the paper)")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform formats around outlier columns, GPTQ solver, a rule for the wide layers."""
        wide, inputs = self._weight(self.down_bits), self._inputs(self.down_bits)
        down = tuple(Rule(sites, wide, inputs=inputs, optional=True) for sites in _DOWN)
        rules = () if self.down_bits == self.bits else down
        weight, inputs = self._weight(self.bits), self._inputs(self.bits)
        return Recipe("quik", weight, GPTQ(), rules=rules, inputs=inputs)

    def _weight(self, bits: int) -> Format:
        base: Format = Uniform(bits, self.group_size, symmetric=True)
        base = Rotated(base, sides="in") if self.rotate else base
        return OutlierColumns(base, self.columns) if self.columns else base

    def _inputs(self, bits: int) -> Inputs:
        return Inputs(Uniform(bits, self.input_group))
