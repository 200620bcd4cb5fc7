"""Memory that is foreseen: a model that cannot fit is refused in one sentence before its weights are read."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch

from bitmill.checkpoint.reader import Checkpoint
from bitmill.errors import NotEnoughMemoryError
from bitmill.models.streamed import StreamedModel
from bitmill.report.text import format_mb


def check_fits(what: str, size_bytes: int, device: str) -> None:
    """Raise NotEnoughMemoryError where more bytes are needed than the CPU's memory has free.

    Args:
        what: names what needs them, at the beginning of the sentence.
        size_bytes: that are needed at least.
        device: on which they are; only the CPU's memory is looked at.
    """
    free = psutil.virtual_memory().available
    if torch.device(device).type == "cpu" and size_bytes > free:
        raise NotEnoughMemoryError(
            f"{what} needs at least {format_mb(size_bytes)} of memory and {format_mb(free)} are free; end other "
            "programs, or use fewer bits or a smaller model."
        )


def check_folder_fits(checkpoint: Checkpoint, dtype: torch.dtype, device: str, dense: bool) -> None:
    """Raise NotEnoughMemoryError where the weights of a packed folder do not fit.

    Args:
        checkpoint: the folder.
        dtype: of weights that are not packed.
        device: to load on.
        dense: True if the weights are unpacked.
    """
    packed = sum(_packed_bytes(checkpoint, name) for name in checkpoint.formats)
    if dense:
        packed = sum(math.prod(shape) for shape in checkpoint.shapes.values()) * dtype.itemsize
    owned = tuple(f"{name}." for name in checkpoint.formats)
    floats = [entry for name, entry in checkpoint.entries.items() if not name.startswith(owned)]
    rest = sum(math.prod(entry.shape) for entry in floats if entry.dtype.is_floating_point) * dtype.itemsize
    check_fits(f"{checkpoint.folder}{' in float' if dense else ''}", packed + rest, device)


def _packed_bytes(checkpoint: Checkpoint, layer: str) -> int:
    format, shape = checkpoint.formats[layer], checkpoint.shape(layer)
    own = {part: size for part, size in format.layout(shape).items() if part not in format.shared}
    return sum(math.prod(size) * dtype.itemsize for size, dtype in own.values())


def check_float_fits(model: str | Path, streamed: StreamedModel, dtype: torch.dtype, device: str) -> None:
    """Raise NotEnoughMemoryError where the weights of a float model do not fit."""
    numbers = sum(math.prod(streamed.shape(name)) for name in streamed.names())
    check_fits(f"{model} in float", numbers * dtype.itemsize, device)


def check_block_fits(streamed: StreamedModel, device: str) -> None:
    """Raise NotEnoughMemoryError where the largest block does not fit in float32: a quantization holds one."""
    blocks = (streamed.block_tensors(index) for index in range(len(streamed.blocks)))
    largest = max((sum(math.prod(streamed.shape(name)) for name in names) for names in blocks), default=0)
    check_fits("The largest block of the model in float32", 4 * largest, device)
