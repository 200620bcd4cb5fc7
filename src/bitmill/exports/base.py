"""The contract of a target: which matrices it can hold, as which tensors, and how its config describes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bitmill.config.registry import Registry
from bitmill.formats import Format
from bitmill.formats.quantized import Quantized


@dataclass(frozen=True)
class Layer:
    """A quantized layer without its numbers.

    Attributes:
        format: of the matrix.
        shape: (out, in).
    """

    format: Format
    shape: tuple[int, int]


class Target(ABC):
    """A kind of checkpoint that other programs read.

    Attributes:
        name: as of --to.
        readers: the programs, for messages.
    """

    name: ClassVar[str]
    readers: ClassVar[str]

    @abstractmethod
    def unsupported_reason(self, layer: Layer) -> str | None:
        """Return why the target cannot hold a layer, as the end of a sentence; None where it can."""

    def mixed_reason(self, layers: Mapping[str, Layer]) -> str | None:
        """Return why the target cannot hold these layers in one checkpoint; None where it can.

        Args:
            layers: by name, each of which the target holds alone.
        """
        return None

    def notes(self, layers: Mapping[str, Layer]) -> list[str]:
        """Return what readers do with such a checkpoint that a user should know, a sentence each."""
        return []

    @abstractmethod
    def tensors(self, quantized: Quantized) -> dict[str, Tensor]:
        """Return the tensors of a layer, by their names after the layer's."""

    @abstractmethod
    def decode(self, tensors: dict[str, Tensor], layer: Layer) -> Tensor:
        """Return the matrix fp32 (out, in) that a reader makes of the tensors."""

    @abstractmethod
    def config(self, layers: Mapping[str, Layer], floats: Sequence[str]) -> dict[str, Any]:
        """Return `quantization_config` of config.json.

        Args:
            layers: quantized layers by name.
            floats: names of the linear layers that stay in float.
        """

    def config_entries(self, described: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of config.json, of what `config` returns."""
        return {"quantization_config": described}

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return further JSON files by name."""
        return {}


TARGETS: Registry[type[Target]] = Registry("export", "bitmill.exports.targets")
