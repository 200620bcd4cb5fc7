"""The table of weights: bits x group sizes, and the 4- and 8-bit floats, all rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bitmill.formats.quantized import Quantized
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.workflows.sweep.cell import Cell, Change, Layer

BITS = (8, 6, 5, 4, 3, 2)
SIZES: tuple[GroupSize, ...] = ("tensor", "row", 128, 64, 32)
FLOATS = ("fp8", "nf4", "nvfp4", "mxfp4")


@dataclass
class WeightCell(Cell):
    """A data-free recipe of one format."""

    of: ClassVar[str] = "weight"
    error: ClassVar[str] = "weight_error"

    recipe: Recipe

    def round(self, layer: Layer) -> Change:
        """Quantize the weight of a layer."""
        scheme = self.recipe.default
        quantized: Quantized = solve(scheme.solver, layer.W, Statistics(), scheme.format)
        decoded = quantized.dequantize()
        self.errors[layer.name] = output_error(layer.W, decoded, None)
        self.stored_bits += quantized.format.stored_bits(quantized.shape)
        self.numbers += layer.W.numel()

        def change(streamed: StreamedModel) -> None:
            streamed.set_matrix(f"{layer.name}.weight", decoded)

        return change

    def describe(self) -> dict[str, Any]:
        """Return the method."""
        return {"method": self.recipe.name}


def weight_cells(search: bool) -> list[Cell]:
    """Return the empty table, rows of falling bits and group sizes.

    Args:
        search: shrink each range to the least squared error.
    """
    options: list[tuple[str, dict[str, Any]]] = [
        ("rtn", {"bits": bits, "group_size": size}) for bits in BITS for size in SIZES
    ]
    cells: list[Cell] = []
    for method, values in [*options, *((name, {}) for name in FLOATS)]:
        recipe = build_recipe(method, {**values, "search": search})
        core = recipe.default.format.core
        cells.append(WeightCell(f"{core.bits} bits" if values else method, core.bits, core.group_size, recipe))
    return cells
