"""What every writer of an export needs: the folder, its layers, and its tensors one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitmill.architectures.experts import expert_of
from bitmill.checkpoint.marker import WEIGHT
from bitmill.checkpoint.reader import Checkpoint
from bitmill.errors import NumericsError, UsageError
from bitmill.exports.base import Layer
from bitmill.formats.quantized import Quantized
from bitmill.models.config_only import open_config_only
from bitmill.models.meta import empty_model
from bitmill.progress import Progress


@dataclass(frozen=True)
class ExportJob:
    """A folder that is exported.

    Attributes:
        checkpoint: the folder.
        dtype: of tensors in float.
        trust_remote_code: allow Python code in the folder to run.
        progress: where progress is reported.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    trust_remote_code: bool
    progress: Progress

    @cached_property
    def config(self) -> Any:
        """The config of the model, as transformers reads it."""
        return open_config_only(self.checkpoint.folder, trust_remote_code=self.trust_remote_code).config

    @cached_property
    def linears(self) -> list[str]:
        """The paths of the linear layers of the model, quantized or not."""
        outline = open_config_only(self.checkpoint.folder, trust_remote_code=self.trust_remote_code)
        return [name for name, module in empty_model(outline).named_modules() if isinstance(module, nn.Linear)]

    def layers(self, target: str, unsupported_reason: Callable[[Layer], str | None]) -> dict[str, Layer]:
        """Return the quantized layers of the blocks.

        Args:
            target: its name.
            unsupported_reason: why the target cannot hold a layer, as the end of a sentence.

        Raises:
            UsageError: the target cannot hold a layer, or there is none.
        """
        formats, outside = self.checkpoint.formats, self.checkpoint.outside
        layers = {
            name: Layer(f, self.checkpoint.shape(name)) for name, f in formats.items() if name not in outside
        }
        if not layers:
            raise UsageError(f"{self.checkpoint.folder} has no quantized layer in its blocks; use --to dense.")
        for name, layer in layers.items():
            reason = unsupported_reason(layer)
            if expert_of(name):
                reason = "the experts of a fused tensor are not exported quantized yet"
            elif name not in self.linears:
                reason = "it is no nn.Linear, which readers expect"
            if reason:
                raise UsageError(f"{target} cannot hold the layer {name!r}: {reason}, or use --to dense.")
        return layers

    def quantized(self) -> Iterator[tuple[str, Quantized]]:
        """Yield the quantized layers by name, embedding and head among them."""
        for name in self.checkpoint.formats:
            yield name, self.checkpoint.quantized(name)

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that the folder stores in float, and other buffers, by name."""
        packed = {f"{name}.{WEIGHT}" for name in self.checkpoint.formats}
        for name, format in self.checkpoint.formats.items():
            packed |= {f"{name}.{part}" for part in format.layout(self.checkpoint.shape(name))}
        for name in self.checkpoint.entries:
            if name not in packed:
                yield name, self.checkpoint.tensor(name)

    def in_float(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the type of the export. Raises NumericsError where it is beyond its range."""
        if not tensor.is_floating_point():
            return tensor
        cast = tensor.to(self.dtype)
        if bool(torch.isfinite(cast).all()):
            return cast
        raise NumericsError(
            f"{name} reaches {float(tensor.abs().amax()):.3g}, beyond {self.dtype}; use --dtype bfloat16."
        )


class Writer(ABC):
    """Writes one kind of export.

    Attributes:
        name: as of --to.
        readers: programs that read it, for messages.
        ending: of the place that is written without -o.
        is_file: writes one file, and not a folder.
    """

    name: str
    readers: str
    ending: str
    is_file: ClassVar[bool] = False

    @abstractmethod
    def check(self, job: ExportJob) -> dict[str, Layer]:
        """Return the layers that will be stored quantized. Raises UsageError where the kind cannot hold one."""

    @abstractmethod
    def write(self, job: ExportJob, layers: dict[str, Layer], out: Path) -> list[str]:
        """Write a folder that exists, or a file that does not; returns notes, a sentence each."""


def check_equal(name: str, decoded: Tensor, quantized: Quantized, target: str) -> None:
    """Raise NumericsError unless what a reader decodes is what the folder decodes to."""
    if not torch.equal(decoded, quantized.dequantize()):
        raise NumericsError(f"The layer {name!r} would decode to other numbers as {target}; report this.")
