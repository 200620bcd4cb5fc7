"""Quantize a live module in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.models.embedding_and_head import EmbeddingAndHead, embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult
from bitmill.pipeline.job import NON_BLOCK, Shared
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.replace import replace_layers


class ModuleSink:
    """Collects packed layers, and puts them into a live module once all of them are there.

    Until `finish` the module is untouched, so that a run that fails leaves the caller's model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.work: Path | None = None
        self.layers: list[dict[str, Any]] = []
        self._packed: dict[str, tuple[Format, dict[str, Tensor]]] = {}
        self._places: dict[str, str] = {}
        self._ends: EmbeddingAndHead | None = None
        self._changed: dict[str, Tensor] = {}
        self._shared: Shared = {}

    def finished(self, index: int) -> BlockResult | None:
        """Nothing is kept between runs."""
        return None

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Keep the block's packed layers, and what a transform changed."""
        for name, layer in result.layers.items():
            device = device_of(self.model.get_submodule(name))
            parts = {part: tensor.to(device) for part, tensor in layer.own().items()}
            self._packed[name] = layer.quantized.format, parts
            if layer.shared:
                self._places[name] = layer.shared
            self.layers.append({"name": name, **layer.summary()})
        if result.index == NON_BLOCK:
            self._ends = embedding_and_head(streamed)
        for name, tensor in result.changed.items():
            parameter = self.model.get_parameter(name)
            self._changed[name] = tensor.to(parameter.device, parameter.dtype)

    def shared(self) -> Shared | None:
        """Nothing is kept between runs."""
        return None

    def share(self, parts: Shared) -> None:
        """Keep what layers share."""
        self._shared = parts

    def finish(self) -> None:
        """Replace the linears, and what a transform changed; everything is where it belongs already."""
        formats = {name: format for name, (format, _) in self._packed.items()}
        ends = self._ends.to_dict() if self._ends else None
        biases = {name: getattr(module, "bias", None) for name, module in self.model.named_modules()}
        # on the meta device: the memory is the packed tensors' own
        for name, new in replace_layers(self.model, formats, ends, self._places, "meta").items():
            parts = self._packed[name][1] if name in self._packed else {}  # a tied head has none
            new.set_packed(parts)
            if isinstance(new, QuantLinear):
                new.bias = biases[name]
                if new.shared is not None:
                    shared, device = self._shared[self._places[name]], parts["codes"].device
                    new.shared.set_packed({part: tensor.to(device) for part, tensor in shared.items()})
        for name, tensor in self._changed.items():
            self.model.get_parameter(name).data = tensor
        self._packed, self._changed, self._shared = {}, {}, {}


@contextmanager
def eval_mode(module: nn.Module | None) -> Iterator[None]:
    """Keep dropout and the like out of what is measured; a module that was training goes on with it."""
    training = [m for m in module.modules() if m.training] if module is not None else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters lie."""
    return next(module.parameters()).device
