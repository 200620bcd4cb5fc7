"""The layers of each block, without inputs, with those of the float model on a text, or with random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitmill.calibration.collect import recorded_inputs
from bitmill.calibration.streams import BATCH_TOKENS
from bitmill.calibration.walk import HiddenStates
from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.rng import normals
from bitmill.workflows.sweep.cell import Layer, LayerInputs

_WithInputs = tuple[str, Tensor, LayerInputs | None]

_RANDOM_TOKENS = 256  # half to fit scales to, half to measure on


class Layers:
    """The layers of the blocks of a model, without their inputs.

    Attributes:
        are_real: errors are those of the model's own numbers.
    """

    are_real: ClassVar[bool] = True

    def __init__(self, streamed: StreamedModel) -> None:
        self._streamed = streamed

    def of_block(self, index: int, block: nn.Module) -> list[Layer]:
        """Return the layers of a block. Called once for every block, in order.

        Args:
            index: number of the block.
            block: the block, with float weights.
        """
        prefix = self._streamed.block_name(index)
        return [
            Layer(f"{prefix}.{path}", W, inputs)
            for path, W, inputs in self._with_inputs(index, block, self._matrices(index))
        ]

    def describe(self) -> dict[str, Any] | None:
        """Return where inputs come from as plain data, or None where there are none."""
        return None

    def _matrices(self, index: int) -> dict[str, Tensor]:
        """Return path in the block -> weight, fp32 (out, in)."""
        linears, prefix = self._streamed.linears(index), self._streamed.block_name(index)
        return {path: self._streamed.matrix(f"{prefix}.{path}.weight") for path in linears}

    def _with_inputs(self, index: int, block: nn.Module, matrices: dict[str, Tensor]) -> Iterator[_WithInputs]:
        """Yield path, weight and inputs of every layer."""
        for path, W in matrices.items():
            yield path, W, None


class RandomInputs(Layers):
    """Independent normal numbers: channels and tokens of equal power, without outliers."""

    are_real: ClassVar[bool] = False

    def __init__(self, streamed: StreamedModel) -> None:
        super().__init__(streamed)
        self._drawn: dict[int, LayerInputs] = {}

    def _with_inputs(self, index: int, block: nn.Module, matrices: dict[str, Tensor]) -> Iterator[_WithInputs]:
        for path, W in matrices.items():
            yield path, W, self._draw(W)

    def describe(self) -> dict[str, Any]:
        """Return that inputs are random."""
        return {"source": "random", "tokens": _RANDOM_TOKENS}

    def _draw(self, W: Tensor) -> LayerInputs:
        columns = W.shape[1]
        if columns not in self._drawn:
            x = normals(0, columns, _RANDOM_TOKENS * columns).to(torch.float32).view(-1, columns).to(W.device)
            self._drawn[columns] = _halves(x)
        return self._drawn[columns]


class TextInputs(Layers):
    """The inputs of the float model on windows of a text."""

    def __init__(self, streamed: StreamedModel, text: str, windows: int, seqlen: int) -> None:
        """Embed the windows.

        Args:
            streamed: the float model.
            text: source of the text, of whose part for calibration windows are cut.
            windows: number of windows.
            seqlen: tokens of a window.
        """
        super().__init__(streamed)
        self._text = text
        tokens = streamed.task.windows(text, streamed.task.reader(streamed.source)).calibration(windows, seqlen, 0)
        self._shape = windows, seqlen
        with streamed.non_block_weights("embedding"):
            self._stream = HiddenStates(streamed, tokens.split(max(1, BATCH_TOKENS // seqlen)))

    def _with_inputs(self, index: int, block: nn.Module, matrices: dict[str, Tensor]) -> Iterator[_WithInputs]:
        with recorded_inputs(block, list(matrices)) as recorded:
            self._stream.advance(block, index)
        made: dict[tuple[int, ...], LayerInputs] = {}  # layers that read one tensor share it
        for path, W in matrices.items():
            batches = recorded[path]
            if not batches:
                raise SourceError(
                    f"{self._streamed.block_name(index)}.{path} does not run on this text, so that there are no "
                    "inputs to round; use more text."
                )
            key = tuple(map(id, batches))
            if key not in made:
                made[key] = _halves(torch.cat([x.reshape(-1, x.shape[-1]) for x in batches]).to(torch.float32))
            yield path, W, made[key]

    def describe(self) -> dict[str, Any]:
        """Return the text and the windows."""
        windows, seqlen = self._shape
        return {"source": "text", "text": self._text, "split": "calib", "windows": windows, "seqlen": seqlen}


def _halves(x: Tensor) -> LayerInputs:
    """Cut inputs (tokens, columns) into those to fit and those to measure."""
    half = x.shape[0] // 2
    return LayerInputs(x[:half], x[half:])
