"""Quantize a live module in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.formats import Format
from bitmill.models.skeleton import Skeleton
from bitmill.pipeline import BlockResult
from bitmill.runtime import swap_linear


class ModuleSink:
    """Collects packed layers, and puts them into a live module once all of them are there.

    Until `finish` the module is untouched, so that a run that fails leaves the caller's model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.work: Path | None = None
        self.layers: list[dict[str, Any]] = []
        self._packed: list[tuple[str, Format, dict[str, Tensor]]] = []
        self._changed: dict[str, Tensor] = {}

    def finished(self, index: int) -> BlockResult | None:
        """Nothing is kept between runs."""
        return None

    def write(self, result: BlockResult, skeleton: Skeleton) -> None:
        """Keep the block's packed layers, and what a transform changed."""
        for name, layer in result.layers.items():
            device = device_of(self.model.get_submodule(name))
            parts = {part: tensor.to(device) for part, tensor in layer.quantized.pack().items()}
            self._packed.append((name, layer.quantized.format, parts))
            self.layers.append({"name": name, **layer.summary()})
        for name, tensor in result.changed.items():
            parameter = self.model.get_parameter(name)
            self._changed[name] = tensor.to(parameter.device, parameter.dtype)

    def finish(self) -> None:
        """Replace the linears, and what a transform changed; everything is where it belongs already."""
        for name, format, parts in self._packed:
            bias = getattr(self.model.get_submodule(name), "bias", None)
            new = swap_linear(self.model, name, format, "meta")  # the memory is the packed tensors' own
            new._buffers.update(parts)
            new.bias = bias
        for name, tensor in self._changed.items():
            self.model.get_parameter(name).data = tensor
        self._packed, self._changed = [], {}


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
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
