"""The stored matrices of one layer of vLLM: collected while the folder is read, then packed for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.checkpoint.marker import WEIGHT
from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.integrations.vllm.shards import shard
from bitmill.runtime.modules.linear import QuantLinear

Cut = tuple[slice, slice]  # rows and columns, with their starts and stops
_PARTS = {None: 0, "q": 0, "k": 1, "v": 2}  # numbers of the matrices that vLLM names; it counts those of others


@dataclass(frozen=True)
class Rank:
    """What one rank of a tensor-parallel model holds of a layer.

    Attributes:
        number: of the rank.
        rows: of each matrix that vLLM fuses, on one rank.
        columns: on one rank.
    """

    number: int
    rows: list[int]
    columns: int

    def cut(self, part: int, shape: tuple[int, int]) -> Cut:
        """Return the rows and columns of a matrix that this rank holds.

        Args:
            part: number of the matrix.
            shape: (rows, columns) of the whole matrix.
        """
        rows = self.rows[part]
        first = self.number % max(1, shape[0] // rows) if shape[0] % rows == 0 else 0
        column = self.number * self.columns if self.columns < shape[1] else 0
        return slice(first * rows, min((first + 1) * rows, shape[0])), slice(column, column + self.columns)


@dataclass
class PackedWeights:
    """The tensors of the matrices that vLLM fuses into one layer.

    Attributes:
        name: of vLLM's layer, for messages.
        formats: of each matrix; None for one that is in float.
        found: tensors of each matrix by name, as they are read.
    """

    name: str
    formats: list[Format | None]
    found: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.found = [{} for _ in self.formats]

    def register(self, layer: nn.Module) -> None:
        """Give a layer an empty parameter for every tensor that the folder may have of it, with its loader."""
        names = {WEIGHT}.union(*(format.layout((1, 1)) for format in self.formats if format))
        for name in sorted(names):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            vars(parameter)["weight_loader"] = self._loader(name)
            layer.register_parameter(name, parameter)

    def _loader(self, name: str) -> Any:
        def load(parameter: nn.Parameter, tensor: Tensor, part: Any = None) -> None:
            self.found[_PARTS.get(part, part)][name] = tensor

        return load

    def build(
        self, layer: nn.Module, cut_of: Callable[[int, tuple[int, int]], Cut], device: torch.device
    ) -> list[nn.Module]:
        """Return the layers that multiply with each matrix, and remove the empty parameters.

        Args:
            layer: of vLLM.
            cut_of: returns what this rank holds of a matrix, by its number and shape.
            device: where it runs.

        Raises:
            CheckpointError: tensors are missing, or the matrix cannot be divided.
        """
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, name)
        modules: list[nn.Module] = []
        for part, (format, tensors) in enumerate(zip(self.formats, self.found)):
            if WEIGHT not in tensors:
                raise CheckpointError(f"The folder has no matrix {part} of {self.name!r}; quantize it again.")
            weight = tensors.pop(WEIGHT)
            cut = cut_of(part, (weight.shape[-2], weight.shape[-1]))
            modules.append(
                _packed(format, tensors, weight, cut, device) if format else _float(weight[cut], device)
            )
        self.found = []
        return modules


def _packed(
    format: Format, tensors: dict[str, Tensor], marker: Tensor, cut: Cut, device: torch.device
) -> QuantLinear:
    shape = (marker.shape[1], marker.shape[2])
    if cut != (slice(0, shape[0]), slice(0, shape[1])):
        tensors, shape = shard(format, tensors, shape, *cut)
    module = QuantLinear(format, shape, bias=False, device="meta")
    module.set_packed({name: tensors[name].to(device) for name in format.layout(shape)})
    module.kernel_on(device)
    return module


def _float(weight: Tensor, device: torch.device) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight.to(device, torch.get_default_dtype()).contiguous(), requires_grad=False)
    return module
