"""What goes into the loop and what comes out of it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from bitmill.calibration.token_windows import JobData
from bitmill.data.text import Windows
from bitmill.formats.quantized import Quantized
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.recipes.scheme import LayerScheme

Propagate = Literal["quantized", "float"]
NON_BLOCK = -1  # what stands for the index of a block where the layers outside of all blocks are meant
Shared = dict[
    str, dict[str, Tensor]
]  # path of a module, see `shared_module_path` -> packed tensors that layers share


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
        identity: plain data that decides the bytes of the result.
    """

    streamed: StreamedModel
    resolved: ResolvedRecipe
    data: JobData = JobData()
    propagate: Propagate = "quantized"
    statistics: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe

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
        return self.resolved.schemes[layer] is not None

    def scheme(self, layer: str) -> LayerScheme:
        """Return the scheme of the quantized linear layer with this full name."""
        scheme = self.resolved.schemes[layer]
        assert scheme is not None, layer
        return scheme


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer and what is known about it.

    shared: where the parts are that it shares, as the path of a module; "" where it shares none.
    """

    quantized: Quantized
    weight_error: float  # relative squared error of the weights
    output_error: float | None  # relative squared error of the outputs on the calibration text
    shared: str = ""

    def summary(self) -> dict[str, Any]:
        """The layer as plain data, for the report; what it shares is not counted."""
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
        return {**described, "shared": self.shared} if self.shared else described

    def own(self) -> dict[str, Tensor]:
        """The packed tensors that belong to this layer alone."""
        shared = self.quantized.format.shared
        return {name: tensor for name, tensor in self.quantized.pack().items() if name not in shared}


@dataclass
class BlockResult:
    """One finished block: quantized layers by full name, and float tensors that a transform or tuner changed.

    The index NON_BLOCK stands for embedding and head.
    """

    index: int
    layers: dict[str, LayerResult] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


class Sink(Protocol):
    """Where finished blocks go; it also says which ones it already holds."""

    @property
    def work(self) -> Path | None:
        """A folder for what is needed until the result is there; None where the sink has no such place."""

    def finished(self, index: int) -> BlockResult | None:
        """A block finished earlier, so that the loop can go on from it; None to quantize it now."""

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Keep a finished block."""

    def shared(self) -> Shared | None:
        """What an earlier run kept by `share`. Asked, as `share` is called, only where layers share parts."""

    def share(self, parts: Shared) -> None:
        """Keep what layers share, before the first block comes."""
