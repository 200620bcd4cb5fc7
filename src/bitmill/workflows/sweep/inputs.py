"""The table of inputs (activations): bits x granularities, symmetric or not, and floats; weights stay in float.

error   relative squared error of the output of a layer, sum ((Q(x) - x) W^T)^2 / sum (x W^T)^2
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from bitmill.architectures.inputs import hook_inputs
from bitmill.formats.base import Params
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.inputs import Inputs, parse_inputs
from bitmill.solvers import Statistics
from bitmill.solvers.base import squared_norm
from bitmill.workflows.sweep.cell import Cell, Change, Layer, LayerInputs

BITS = (8, 6, 4)
SIZES: tuple[GroupSize, ...] = ("tensor", "row", 128, 64)
FLOATS = {"fp8": "float:element=e4m3", "mxfp4": "microscaling:element=e2m1"}

_WEIGHT = Uniform(8, "row")  # any format: weights are not rounded


@dataclass
class InputCell(Cell):
    """A format of inputs.

    Attributes:
        spelled: as in `bitmill quantize --inputs`.
        inputs: the format.
    """

    of: ClassVar[str] = "input"
    error: ClassVar[str] = "output_error"

    spelled: str
    inputs: Inputs
    _rounded: tuple[LayerInputs, Params, Tensor] | None = field(default=None, kw_only=True)

    def round(self, layer: Layer) -> Change:
        """Round the inputs of a layer; a static scale covers the largest of the fitted ones."""
        assert layer.inputs is not None
        if self._rounded is None or self._rounded[0] is not layer.inputs:  # layers that read one input follow
            self._rounded = (layer.inputs, *self._round(layer.inputs, layer.W))
        x, (_, params, rounded) = layer.inputs.measured, self._rounded
        error = squared_norm((rounded - x) @ layer.W.T)
        self.errors[layer.name] = error / layer.output_power if layer.output_power else error
        self.stored_bits += self._stored_bits((x.shape[0], x.shape[1]))
        self.numbers += x.numel()

        def change(streamed: StreamedModel) -> None:
            hook_inputs(
                streamed.model.get_submodule(layer.name), partial(self._format.effective_inputs, params=params)
            )

        return change

    def describe(self) -> dict[str, Any]:
        """Return the format as in `bitmill quantize --inputs`."""
        return {"inputs": self.spelled}

    @property
    def _format(self) -> QuantizedInputs:
        format = self.inputs.around(_WEIGHT)
        assert isinstance(format, QuantizedInputs)
        return format

    def _round(self, inputs: LayerInputs, W: Tensor) -> tuple[Params, Tensor]:
        fitted = inputs.fitted
        params = self._format.fit_inputs(Statistics(max_abs=fitted.abs().amax(0), samples=fitted), W)
        return params, self._format.effective_inputs(inputs.measured, params)

    def _stored_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of inputs (tokens, columns) with their scales; static ones are stored with the layer."""
        format = self.inputs.format
        if self.inputs.static:
            return shape[0] * format.codes_in(shape[1]) * format.code_bits
        return format.stored_bits(shape)


def input_cells() -> list[Cell]:
    """Return the empty table, rows of falling bits and granularities."""
    spelled = {}
    for bits in BITS:
        for symmetric in (True, False):
            for size in SIZES:
                options = {"bits": bits, "group_size": size, "symmetric": symmetric, "static": size == "tensor"}
                name = f"{bits} bits" if symmetric else f"{bits} bits asymmetric"
                spelled["uniform:" + ",".join(f"{k}={str(v).lower()}" for k, v in options.items())] = name
    spelled |= {f"{text},simulated=true": name for name, text in FLOATS.items()}
    return [_cell(name, text) for text, name in spelled.items()]


def _cell(name: str, spelled: str) -> InputCell:
    inputs = parse_inputs(spelled)
    assert inputs is not None
    return InputCell(name, inputs.format.core.bits, inputs.format.core.group_size, spelled, inputs)
