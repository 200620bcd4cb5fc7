"""The errors of all layers as heat maps, kinds of layers by blocks, on a logarithmic colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitmill.report import formatting
from bitmill.report.charts import LayerGrid, layer_grid, log_ticks, short_names
from bitmill.report.results import Layer

COLOUR_STEPS = 20  # of the scale, which interpolates 5 colours
ERRORS = {"output_error": "outputs on the calibration text", "weight_error": "weights"}
_MANY_BLOCKS = 12  # from here on every fifth block is labelled


@dataclass(frozen=True)
class HeatScale:
    """A logarithmic scale from `low`, which all smaller values share, to `high`.

    clipped: some values are smaller than `low`.
    """

    low: float
    high: float
    clipped: bool

    def share(self, value: float) -> float:
        """Return the place of a value on the scale, 0 to 1."""
        if value <= self.low:
            return 0.0
        return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))

    def step(self, value: float) -> int:
        """Return the colour of a value, 0 to COLOUR_STEPS."""
        return round(COLOUR_STEPS * self.share(value))

    def ticks(self) -> list[tuple[float, str]]:
        """Return (place in percent, text) of round values and of both ends."""
        ends = [(0.0, ("≤ " if self.clipped else "") + formatting.number(self.low, 2))]
        if self.high > self.low:
            ends.append((100.0, formatting.number(self.high, 2)))
        inside = [(100 * self.share(v), formatting.number(v, 1)) for v in log_ticks(self.low, self.high)]
        return [ends[0], *(tick for tick in inside if 30 < tick[0] < 86), *ends[1:]]


@dataclass(frozen=True)
class HeatCell:
    """One layer: its colour, its figure as text, and whether it is the largest of the map."""

    step: int
    text: str
    largest: bool


@dataclass(frozen=True)
class KindErrors:
    """The errors of one kind of layer.

    cells: by block; None where a block has no such layer.
    values: its errors, by block.
    mean, largest: of its errors.
    block: the block of the largest error.
    """

    name: str
    cells: list[HeatCell | None]
    values: list[float | None]
    mean: float
    largest: float
    block: int


@dataclass(frozen=True)
class HeatMap:
    """One error of all layers of a model.

    kinds: the rows.
    blocks: numbers of the blocks, the columns.
    labels: texts under the columns, some empty.
    worst: text of the cell with the largest error.
    """

    kinds: list[KindErrors]
    blocks: list[int]
    labels: list[str]
    worst: str

    def mean(self, kind: str) -> float | None:
        """Return the mean error of a kind of layer; None where the model has no such layer."""
        return next((row.mean for row in self.kinds if row.name == kind), None)


@dataclass(frozen=True)
class ErrorMaps:
    """Heat maps of one kind of error with a common scale.

    error: attribute of the layers.
    of: the erroneous values in words.
    maps: by model, those without such errors left out.
    """

    error: str
    of: str
    scale: HeatScale
    maps: dict[str, HeatMap]

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers of all models, in order of appearance."""
        return list(dict.fromkeys(row.name for drawn in self.maps.values() for row in drawn.kinds))


def error_maps(models: Mapping[str, Sequence[Layer]]) -> list[ErrorMaps]:
    """Draw the errors of outputs and of weights, where they are recorded.

    Args:
        models: the quantized layers of each model, by its name.
    """
    found = []
    for error, of in ERRORS.items():
        values = sorted(v for layers in models.values() for layer in layers if (v := getattr(layer, error)))
        if values:
            low = values[len(values) // 50]  # the lowest 2 % would leave all others in few colours
            scale = HeatScale(low, values[-1], values[0] < low)
            maps = {name: _heat_map(layers, error, scale) for name, layers in models.items()}
            found.append(ErrorMaps(error, of, scale, {name: drawn for name, drawn in maps.items() if drawn}))
    return found


def _heat_map(layers: Sequence[Layer], error: str, scale: HeatScale) -> HeatMap | None:
    grid = layer_grid(layers)
    table = grid.values(layers, error)
    largest = max((value for row in table for value in row if value is not None), default=None)
    if largest is None:
        return None
    names = short_names(grid.rows)
    kinds = [_kind(name, row, grid, largest, scale) for name, row in zip(names, table)]
    every = 1 if len(grid.blocks) <= _MANY_BLOCKS else 5
    labels = [str(block) if column % every == 0 else "" for column, block in enumerate(grid.blocks)]
    shown = [kind for kind in kinds if kind is not None]
    worst = max(shown, key=lambda kind: kind.largest)
    return HeatMap(shown, grid.blocks, labels, _cell_text(worst.block, worst.name, largest))


def _kind(
    name: str, values: list[float | None], grid: LayerGrid, largest: float, scale: HeatScale
) -> KindErrors | None:
    present = [(value, block) for value, block in zip(values, grid.blocks) if value is not None]
    if not present:
        return None
    cells = [
        None
        if value is None
        else HeatCell(scale.step(value), f"block {block}, {name}: {formatting.number(value, 3)}", value == largest)
        for value, block in zip(values, grid.blocks)
    ]
    most, block = max(present, key=lambda pair: pair[0])
    return KindErrors(name, cells, values, sum(value for value, _ in present) / len(present), most, block)


def _cell_text(block: int, name: str, value: float) -> str:
    return f"block {block}, {name}: {formatting.number(value, 3)}"
