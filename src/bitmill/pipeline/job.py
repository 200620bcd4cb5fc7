"""Input and output of the loop over blocks, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from bitmill.calibration.token_windows import JobData
from bitmill.data.text import Windows
from bitmill.evaluation.reference import ReferenceRecorder
from bitmill.formats.quantized import Quantized
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.recipes.scheme import LayerScheme

Propagate = Literal["quantized", "float"]
NON_BLOCK = -1  # in place of a block's index: embedding and head
# path of a module, see `shared_module_path` -> packed tensors that layers share
Shared = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """Everything the loop needs, resolved: the model, the scheme of every layer, the data.

    Attributes:
        streamed: the float model.
        resolved: the recipe on this model.
        data: the tokens that calibrate and that measure.
        propagate: input of later blocks during calibration: the outputs of the quantized blocks before them, or of
            the float model's.
        statistics: a folder that keeps the float model's statistics for further recipes.
        recorder: collects predictions of the float model on the held-out windows.
    """

    streamed: StreamedModel
    resolved: ResolvedRecipe
    data: JobData = JobData()
    propagate: Propagate = "quantized"
    statistics: Path | None = None
    recorder: ReferenceRecorder | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect."""
        return self.resolved.needs

    @property
    def calibration(self) -> Tensor | None:
        """The token windows (samples, length) that calibrate."""
        return self.data.windows

    @property
    def held_out(self) -> Windows | None:
        """The token windows to measure on."""
        return self.data.held_out

    def quantizes(self, layer: str) -> bool:
        """Return True if the linear layer with this full name is quantized, and False if it stays in float."""
        return self.resolved.schemes.get(layer) is not None

    def kept(self, index: int) -> frozenset[str]:
        """Return the linear layers of block `index`, by path in it, that stay in float."""
        prefix = self.streamed.block_name(index)
        names = self.streamed.linears(index)
        return frozenset(name for name in names if not self.quantizes(f"{prefix}.{name}"))

    def scheme(self, layer: str) -> LayerScheme:
        """Return the scheme of the quantized linear layer with this full name."""
        scheme = self.resolved.schemes[layer]
        assert scheme is not None, layer
        return scheme


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer and its errors.

    Attributes:
        quantized: the layer.
        weight_error: relative squared error of the weights; None where no float model is known.
        output_error: relative squared error of the outputs on the calibration windows; None without them.
        shared: path of the module that holds the parts it shares; "" where it shares none.
        tokens: calibration tokens that were sent to the layer, for an expert; None for all others.
    """

    quantized: Quantized
    weight_error: float | None
    output_error: float | None
    shared: str = ""
    tokens: int | None = None

    def summary(self) -> dict[str, Any]:
        """Return the layer as plain data, for the report; shared parts are not counted."""
        quantized, shape = self.quantized, self.quantized.shape
        bits = quantized.format.own_bits(shape)
        described = {
            "format": quantized.format.name,
            "shape": list(shape),
            "bits_per_weight": bits / (shape[0] * shape[1]),
            "size_bytes": bits // 8,
            "weight_error": self.weight_error,
            "output_error": self.output_error,
        }
        extra = {"shared": self.shared or None, "tokens": self.tokens}
        return described | {name: value for name, value in extra.items() if value is not None}

    def own(self) -> dict[str, Tensor]:
        """Return the packed tensors that belong to this layer alone."""
        shared = self.quantized.format.shared
        return {name: tensor for name, tensor in self.quantized.pack().items() if name not in shared}


@dataclass
class BlockResult:
    """One finished block.

    Attributes:
        index: the block, or NON_BLOCK for embedding and head.
        layers: quantized layers by full name.
        changed: float tensors that a transform or tuner changed, by full name, in their stored type.
    """

    index: int
    layers: dict[str, LayerResult] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


class Sink(Protocol):
    """Receives finished blocks, and supplies those that an earlier run finished."""

    @property
    def work(self) -> Path | None:
        """A folder for temporary files of the run; None where the sink has none."""

    def finished(self, index: int) -> BlockResult | None:
        """Return a block that an earlier run finished, or None."""

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Keep a finished block."""

    def shared(self) -> Shared | None:
        """Return the parts that an earlier run kept by `share`, or None; called only where layers share parts."""

    def share(self, parts: Shared) -> None:
        """Keep the parts that layers share; called before the first block is written."""
