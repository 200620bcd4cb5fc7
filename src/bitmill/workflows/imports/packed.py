"""Checkpoints that other programs quantized, as sources whose matrices can also be read as they are stored."""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.config.paths import user_path
from bitmill.errors import SourceError, one_line
from bitmill.formats.quantized import Quantized
from bitmill.imports.base import IMPORTERS, Importer
from bitmill.imports.gguf_blocks import quantized as of_blocks
from bitmill.sources.base import Source
from bitmill.sources.gguf import FLOATS, GgufSource
from bitmill.sources.hf import HfSource
from bitmill.sources.hub import origin_of_folder

# in tensors and configs of any shape
_DAMAGED = (IndexError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError, re.error)


class PackedSource(Source, Protocol):
    """A source whose quantized matrices can be read as they are stored.

    program: the name of their format, such as "gptq".
    """

    program: str

    @abstractmethod
    def packed(self) -> frozenset[str]:
        """Return the names of the quantized matrices, as of `names`."""

    @abstractmethod
    def quantized(self, name: str) -> Quantized:
        """Read one quantized matrix. Raises SourceError where no format holds it to the bit."""

    @abstractmethod
    def notes(self) -> list[str]:
        """Return what the checkpoint says that the folder will not, a sentence each."""


class PackedFolder(HfSource):
    """A Hugging Face folder with quantized layers; see `bitmill.imports`."""

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        self._described: dict[str, Any] | None = None
        super().__init__(folder, origin=origin_of_folder(Path(folder)), trust_remote_code=trust_remote_code)
        self.program, self._importer = self._find_importer()
        self._parts = {f"{k}.weight": parts for k, parts in self._importer.layers(self._entries).items()}
        stated = getattr(self.config, "dtype", None)
        self._dtype = stated if isinstance(stated, torch.dtype) and stated.is_floating_point else torch.float16
        for key in ("quantization_config", "quantization"):
            for config in (self.config, self.config.get_text_config()):
                vars(config).pop(key, None)
        self._shapes = {name: self.quantized(name).shape for name in self._parts}
        if not self._parts:
            raise SourceError(f"{self.folder} holds no quantized layer of {self.program}; quantize it instead.")

    def _meet_quantized(self, described: Any) -> None:
        """Keep what the config says."""
        if not isinstance(described, dict):
            super()._meet_quantized(described)
        self._described = described

    def _find_importer(self) -> tuple[str, Importer]:
        """Return the importer of the checkpoint, and its name. Raises SourceError where there is none."""
        plain = self._read_json(self.folder / "config.json")
        described = self._described or plain.get("quantization")
        if not isinstance(described, dict):
            raise SourceError(f"{self.folder} is not quantized; quantize it with bitmill quantize.")
        unnamed = "mlx" if {"bits", "group_size"} <= described.keys() else None
        method = described.get("quant_method", unnamed)
        if method not in IMPORTERS.names():
            raise SourceError(
                f"{self.folder} is quantized by {method!r}, which is not imported; "
                f"{', '.join(IMPORTERS.names())} are."
            )
        try:
            importer = IMPORTERS.get(str(method))(described)
            self._notes = importer.notes()
        except _DAMAGED as error:
            raise SourceError(
                f"The quantization_config of {self.folder} is damaged ({one_line(error)}); fetch the model again."
            ) from None
        return str(method), importer

    def packed(self) -> frozenset[str]:
        """Return the names of the weights of quantized layers."""
        return frozenset(self._parts)

    def quantized(self, name: str) -> Quantized:
        """Read one quantized layer, by the name of its weight."""
        layer = name.removesuffix(".weight")
        tensors = {part: super(PackedFolder, self).tensor(stored) for part, stored in self._parts[name].items()}
        try:
            self._importer.check_parts(layer, tensors)
            made = self._importer.quantized(layer, tensors)
            made.dequantize()
        except SourceError as error:
            raise SourceError(f"The layer {layer!r} of {self.folder} is not imported: {error}") from None
        except _DAMAGED as error:
            raise SourceError(
                f"The tensors of the layer {layer!r} of {self.folder} do not fit each other ({one_line(error)}); "
                "fetch the model again."
            ) from None
        return made

    def notes(self) -> list[str]:
        """Return what the importer leaves out."""
        return self._notes

    def names(self) -> list[str]:
        """Return the names of the tensors of the float model."""
        stored = {name for parts in self._parts.values() for name in parts.values()}
        return [*(name for name in super().names() if name not in stored), *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor of the float model."""
        return self._shapes[name] if name in self._parts else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor; of a quantized layer that of the config."""
        return self._dtype if name in self._parts else super().dtype(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; a quantized layer is decoded."""
        return self.quantized(name).dequantize().to(self._dtype) if name in self._parts else super().tensor(name)


class PackedGguf(GgufSource):
    """A GGUF file with quantized matrices."""

    program = "gguf"

    def packed(self) -> frozenset[str]:
        """Return the names of the matrices that are no floats."""
        return frozenset(n for n in self.names() if self.kind(n) not in FLOATS and len(self.shape(n)) == 2)

    def quantized(self, name: str) -> Quantized:
        """Read one quantized matrix, (out, in)."""
        try:
            return of_blocks(self.kind(name), self.stored_rows(name))
        except SourceError as error:
            raise SourceError(f"The tensor {name!r} of {self.path} is not imported: {error}.") from None
        except _DAMAGED as error:
            raise SourceError(f"The tensor {name!r} of {self.path} is damaged ({one_line(error)}).") from None

    def notes(self) -> list[str]:
        """Return that scales of K-types grow."""
        kinds = {self.kind(name).name for name in self.packed()}
        grown = sorted(kind for kind in kinds if kind.endswith("_K"))
        if not grown:
            return []
        return [f"The scales of {', '.join(grown)} are stored in 32 bits, which takes more room than in the file."]


def open_packed(model: str | Path, trust_remote_code: bool = False) -> PackedSource:
    """Open a checkpoint that another program quantized.

    Args:
        model: a folder, or a .gguf file.
        trust_remote_code: allow Python code in the folder.

    Raises:
        SourceError: it is none, or damaged, or of a kind that is not imported.
    """
    path = user_path(model)
    if path.is_dir():
        return PackedFolder(path, trust_remote_code=trust_remote_code)
    if not path.is_file() or path.suffix != ".gguf":
        raise SourceError(f"There is no folder and no .gguf file at {str(model)!r}; fetch the model first.")
    source = PackedGguf(path)
    if not source.packed():
        raise SourceError(f"{path} holds floats alone; quantize it with bitmill quantize.")
    return source
