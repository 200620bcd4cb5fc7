"""Quantize a module in memory in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.architectures.experts import expert_of, split_experts
from bitmill.formats import Format
from bitmill.models.embedding_and_head import EmbeddingAndHead, embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult
from bitmill.pipeline.job import NON_BLOCK, Shared
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.replace import replace_layers


class ModuleSink:
    """Collects packed layers, and puts them into a module once all of them are finished.

    Until `finish` the module is unchanged, so a run that fails leaves the caller's model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.work: Path | None = None
        self.layers: list[dict[str, Any]] = []
        self.formats: dict[str, Format] = {}
        self._packed: dict[str, dict[str, Tensor]] = {}
        self.places: dict[str, str] = {}
        self._embeddings: EmbeddingAndHead | None = None
        self._changed: dict[str, Tensor] = {}
        self._shared: Shared = {}

    def finished(self, index: int) -> BlockResult | None:
        """Return None: nothing is kept between runs."""
        return None

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Keep a block's packed layers and changed float tensors on the devices of the module.

        Args:
            result: the finished block.
            streamed: the float model.
        """
        for name, layer in result.layers.items():
            device = device_of(_owner(self.model, name))
            parts = {part: tensor.to(device) for part, tensor in layer.own().items()}
            self.formats[name], self._packed[name] = layer.quantized.format, parts
            if layer.shared:
                self.places[name] = layer.shared
            self.layers.append({"name": name, **layer.summary()})
        if result.index == NON_BLOCK:
            self._embeddings = embedding_and_head(streamed).only(result.layers)
        for name, tensor in result.changed.items():
            parameter = self.model.get_parameter(name)
            self._changed[name] = tensor.to(parameter.device, parameter.dtype)

    def shared(self) -> Shared | None:
        """Return None: nothing is kept between runs."""
        return None

    def share(self, parts: Shared) -> None:
        """Keep the parts that layers share."""
        self._shared = parts

    @property
    def ends(self) -> dict[str, Any] | None:
        """Embedding, head and whether they are tied, where they are quantized."""
        return self._embeddings.to_dict() if self._embeddings else None

    def finish(self) -> None:
        """Replace the linears and the changed tensors; all of them are on their devices already."""
        split_experts(self.model)
        biases = {name: getattr(module, "bias", None) for name, module in self.model.named_modules()}
        # on the meta device: the memory is the packed tensors' own
        for name, new in replace_layers(self.model, self.formats, self.ends, self.places, "meta").items():
            parts = self._packed.get(name, {})  # a tied head has none
            new.set_packed(parts)
            if isinstance(new, QuantLinear):
                new.bias = biases[name]
                if new.shared is not None:
                    shared, device = self._shared[self.places[name]], parts["codes"].device
                    new.shared.set_packed({part: tensor.to(device) for part, tensor in shared.items()})
        for name, tensor in self._changed.items():
            self.model.get_parameter(name).data = tensor
        self._packed, self._changed, self._shared = {}, {}, {}


@contextmanager
def eval_mode(module: nn.Module | None) -> Iterator[None]:
    """Put a module into evaluation mode (no dropout), and back into its mode in the end."""
    training = [m for m in module.modules() if m.training] if module is not None else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _owner(model: nn.Module, layer: str) -> nn.Module:
    """Return the module of a linear layer, or the one that holds the fused tensor of an expert."""
    expert = expert_of(layer)
    return model.get_submodule(expert[0].rpartition(".")[0] if expert else layer)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters."""
    return next(module.parameters()).device
