"""Statistics of the inputs of layers while a float model runs on some batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.numerics.statistics import Statistics
from bitmill.runtime.modules.convolution import Unfolding

_SAMPLES = 1024  # rows of a layer's inputs that are kept


class _LayerInputs:
    """Sums over the inputs of one layer; a hook.

    Args:
        layer: a linear layer, or a convolution, whose inputs are patches.
        batches: number of batches that are to come.
    """

    def __init__(self, layer: nn.Module, batches: int) -> None:
        self.unfolding = Unfolding.of(layer) if isinstance(layer, nn.Conv2d) else None
        self.generator = torch.Generator().manual_seed(0)
        self.rows_a_batch = -(-_SAMPLES // batches)
        self.tokens = 0
        self.gram: Tensor | float = 0.0
        self.sum: Tensor | float = 0.0
        self.largest: Tensor | None = None
        self.samples: list[Tensor] = []

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0] if self.unfolding is None else self.unfolding.patches(arguments[0])
        rows = x.reshape(-1, x.shape[-1]).float()
        magnitudes = rows.abs()
        largest = magnitudes.amax(0)
        self.tokens += len(rows)
        self.gram = self.gram + rows.T @ rows
        self.sum = self.sum + magnitudes.sum(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        chosen = torch.randperm(len(rows), generator=self.generator)[: self.rows_a_batch]
        self.samples.append(rows[chosen.to(rows.device)])

    def statistics(self) -> Statistics:
        """Return the statistics; empty ones where the layer did not run."""
        if self.largest is None:
            return Statistics()
        return Statistics(
            self.gram / self.tokens,  # type: ignore[arg-type]
            self.tokens,
            mean_abs=self.sum / self.tokens,  # type: ignore[arg-type]
            max_abs=self.largest,
            samples=torch.cat(self.samples)[:_SAMPLES],
        )


@torch.no_grad()
def input_statistics(
    model: nn.Module, names: Collection[str], batches: Sequence[Tensor | Mapping[str, Any]]
) -> dict[str, Statistics]:
    """Run a float model on batches; return the statistics of layers' inputs by path.

    Args:
        model: in evaluation mode.
        names: paths of linear layers and convolutions.
        batches: arguments of the model: a tensor each, or keywords.
    """
    inputs = {name: _LayerInputs(model.get_submodule(name), len(batches)) for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in inputs.items()]
    try:
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: hook.statistics() for name, hook in inputs.items()}
