"""The contract of an importer: which tensors of a checkpoint are a quantized layer, and which matrix they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from bitmill.config.registry import Registry
from bitmill.errors import SourceError
from bitmill.formats.quantized import Quantized


class Importer(ABC):
    """Reads the quantized layers of one kind of checkpoint.

    Attributes:
        name: `quant_method` of the checkpoint's config.
        marker: the tensor of a layer that only quantized layers have, by its name after the layer's.
        reads: all tensors of a layer that say which matrix it holds, by their names after the layer's.
        passes_over: tensors that say something else, such as how inputs are rounded.

    Args:
        config: `quantization_config` of the checkpoint.

    Raises:
        SourceError: a variant that is not read.
    """

    name: ClassVar[str]
    marker: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    passes_over: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def layers(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the quantized layers of a checkpoint, by name: the names of their tensors by part.

        A part is the name of a tensor after the layer's, such as "qweight".

        Args:
            names: of all stored tensors.
        """
        known, found = set(names), dict[str, dict[str, str]]()
        for name in known:
            if name.endswith(f".{self.marker}"):
                found[name.removesuffix(f".{self.marker}")] = {}
        for name in known:
            layer = name
            while (layer := layer.rpartition(".")[0]) and layer not in found:
                pass
            if layer and (part := name.removeprefix(f"{layer}.")) != "bias":
                found[layer][part] = name
        return dict(sorted(found.items()))

    def check_parts(self, layer: str, parts: Iterable[str]) -> None:
        """Raise SourceError for a tensor of a layer that the importer does not know: it may change the matrix."""
        if unknown := sorted({*parts} - self.reads - self.passes_over):
            raise SourceError(f"its tensor {unknown[0]!r} is not read, and may change what the layer computes.")

    @abstractmethod
    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return the matrix that the tensors of a layer hold.

        Args:
            layer: its name.
            tensors: by part.

        Raises:
            SourceError: the tensors do not fit each other, or no format holds their numbers.
        """

    def notes(self) -> list[str]:
        """Return what the checkpoint says that the folder will not, a sentence each."""
        return []


def needed(tensors: Mapping[str, Any], layer: str, *parts: str) -> list[Any]:
    """Return tensors, or their headers, by part. Raises SourceError where one is missing."""
    if absent := next((part for part in parts if part not in tensors), None):
        raise SourceError(f"The layer {layer!r} has no tensor {absent!r}; fetch the model again.")
    return [tensors[part] for part in parts]


def checked(layer: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor. Raises SourceError where it has another shape than `shape`."""
    if tuple(tensor.shape) != shape:
        raise SourceError(
            f"The tensor '{layer}.{part}' has the shape {tuple(tensor.shape)}, and its layer needs {shape}; fetch "
            "the model again."
        )
    return tensor


IMPORTERS: Registry[type[Importer]] = Registry("import", "bitmill.imports.importers")
