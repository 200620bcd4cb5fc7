"""Open a quantized folder without loading it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

from bitmill.checkpoint.contents import (
    REPORT,
    FileRecord,
    check_digests,
    check_files,
    check_regular,
    read_json,
    record_of,
)
from bitmill.checkpoint.marker import marked_shape, marker_names
from bitmill.checkpoint.report_schema import read_report
from bitmill.checkpoint.schema import (
    FORMAT_VERSION,
    QUANT_METHOD,
    head_config,
    layer_formats,
    shared_paths,
)
from bitmill.checkpoint.tensors import open_tensors
from bitmill.checkpoint.work_folder import check_not_interrupted
from bitmill.config.paths import user_path
from bitmill.errors import CheckpointError, RecipeError, SourceError
from bitmill.evaluation.reference import FILE as REFERENCE_FILE
from bitmill.formats import Format
from bitmill.formats.quantized import Quantized, total_stored_bits, unpack
from bitmill.kv.calibration_file import FILE as KV_FILE
from bitmill.runtime.modules.replace import layers_outside_blocks
from bitmill.sources.config_bounds import check_config
from bitmill.sources.safetensors_header import TensorEntry, read_header

Digests = Literal["none", "but weights", "all"]
_MAX_OPENED = 5


@dataclass(frozen=True)
class Checkpoint:
    """A quantized folder: its documents, the format of every quantized layer, and the file of every tensor.

    Attributes:
        files: tensor name -> shard.
        entries: tensor name -> header entry.
        shapes: quantized layer -> (out, in).
        places: layer -> path of the module that holds its shared parts, for layers that share any.
        outside: embedding and head, where they are quantized.
        kv_bytes: size of the calibration of keys and values.
        record: name -> record of every file that was written; empty where the folder has none.
        foreign: names of files that are not recorded.
    """

    folder: Path
    config: dict[str, Any]
    report: dict[str, Any]
    formats: dict[str, Format]
    files: dict[str, Path]  # tensor name -> shard
    entries: dict[str, TensorEntry]
    shapes: dict[str, tuple[int, int]]  # of the quantized layers, (out, in)
    places: dict[str, str]  # of what quantized layers share, for those that do
    outside: tuple[str, ...] = ()  # embedding and head, where they are quantized
    kv_bytes: int = 0  # of what keys and values were calibrated to
    record: Mapping[str, FileRecord] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}; quantize the model again.")
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def shape(self, layer: str) -> tuple[int, int]:
        """Return the recorded (out, in) of a quantized layer."""
        if layer not in self.shapes:
            raise CheckpointError(f"The report of {self.folder} does not list the layer {layer!r}.")
        return self.shapes[layer]

    def packed(self, layer: str) -> dict[str, Tensor]:
        """Read the packed tensors of one layer, shared ones included.

        Raises:
            CheckpointError: they hold what no encoder stores.
        """
        tensors = {part: self.tensor(name) for part, name in self._names(layer).items()}
        if reason := self.formats[layer].damage_reason(tensors, self.shape(layer)):
            raise CheckpointError(f"The layer {layer!r} of {self.folder} is damaged: {reason}; quantize again.")
        return tensors

    def quantized(self, layer: str) -> Quantized:
        """Read one quantized layer."""
        return unpack(self.formats[layer], self.packed(layer), self.shape(layer))

    def _names(self, layer: str) -> dict[str, str]:
        """Return part -> name of the tensor that holds it, the layer's own or a shared one."""
        format, place = self.formats[layer], self.places.get(layer, layer)
        return {p: f"{place if p in format.shared else layer}.{p}" for p in format.layout(self.shape(layer))}

    def check(self) -> None:
        """Check that every part of every quantized layer has a tensor of the right shape and type.

        Raises:
            CheckpointError: a part is missing or different.
        """
        for layer, format in self.formats.items():
            names, shape = self._names(layer), marked_shape(layer, self.entries)
            if shape not in (None, self.shape(layer)):
                raise CheckpointError(
                    f"The empty weight of {layer!r} in {self.folder} tells the shape {shape}, and its report "
                    f"{self.shape(layer)}; the folder is damaged, quantize again."
                )
            for part, (size, dtype) in format.layout(self.shape(layer)).items():
                name = names[part]
                entry = self.entries.get(name)
                if entry is None or entry.shape != size or entry.dtype != dtype:
                    found = "is missing" if entry is None else f"is {entry.dtype} {entry.shape}"
                    raise CheckpointError(
                        f"The tensor {name!r} of {self.folder} {found}, but {format!r} stores {dtype} {size}; "
                        "the folder is damaged, quantize again."
                    )
        for layer in self.shapes:
            if layer not in self.formats:
                raise CheckpointError(
                    f"{self.folder}/{REPORT} lists the layer {layer!r} and config.json does not; copy both again."
                )

    def layers(self) -> Iterator[dict[str, Any]]:
        """Yield name, format, shape, bits_per_weight and size_bytes of every quantized layer and float tensor."""
        packed = marker_names(self.formats)
        for name, format in self.formats.items():
            shape = self.shape(name)
            own = format.own_layout(shape) if name in self.places else format.layout(shape)
            bits = format.own_bits(shape) if name in self.places else format.stored_bits(shape)
            packed |= {f"{name}.{part}" for part in own}
            yield {
                "name": name,
                "format": format.name,
                "shape": list(shape),
                "bits_per_weight": bits / (shape[0] * shape[1]),
                "size_bytes": bits // 8,
            }
        for name, entry in sorted(self.entries.items()):
            if name not in packed:
                yield {
                    "name": name,
                    "format": str(entry.dtype).removeprefix("torch."),
                    "shape": list(entry.shape),
                    "bits_per_weight": entry.dtype.itemsize * 8.0,
                    "size_bytes": entry.end - entry.begin,
                }

    def uncompiled_layers(self) -> dict[str, str]:
        """Return layer -> why torch rounds the inputs of a few tokens, of layers where compiled code does not."""
        reasons = {name: format.uncompiled_reason(self.shape(name)[1]) for name, format in self.formats.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk of the quantized layers of all blocks, all metadata included, per weight.

        A calibration of keys and values counts too. For a float model: bits of all tensors per weight.
        """
        inside = [name for name in self.formats if name not in self.outside]
        weights = sum(math.prod(self.shape(name)) for name in inside)
        if not inside:
            sizes = [(entry.end - entry.begin, math.prod(entry.shape)) for entry in self.entries.values()]
            total, weights = (sum(column) for column in zip(*sizes))
            return 8 * (total + self.kv_bytes) / max(weights, 1)
        return self._bits(inside) + 8 * self.kv_bytes / max(weights, 1)

    @property
    def head_bits_per_weight(self) -> float | None:
        """Bits on disk of embedding and head per weight; None where they are in float."""
        return self._bits([name for name in self.formats if name in self.outside]) if self.outside else None

    def _bits(self, layers: list[str]) -> float:
        bits = total_stored_bits((self.formats[n], self.shape(n), self.places.get(n, n)) for n in layers)
        return bits / max(sum(math.prod(self.shape(name)) for name in layers), 1)


def is_checkpoint(folder: Path) -> bool:
    """Return True if `folder` has the config of a model quantized by bitmill.

    Raises:
        CheckpointError: the folder has no name, because the process that replaced it was interrupted.
    """
    check_not_interrupted(folder)
    try:
        return bool(read_json(folder, "config.json")["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (CheckpointError, ValueError, KeyError, TypeError):  # ValueError: no path
        return False


def is_bitmill_folder(folder: Path) -> bool:
    """Return True if bitmill wrote `folder`, quantized or with float weights and a KV calibration.

    Raises:
        CheckpointError: the folder has no name, because the process that replaced it was interrupted.
    """
    if is_checkpoint(folder):
        return True
    try:
        return bool(read_json(folder, REPORT)["kv"])
    except (CheckpointError, ValueError, KeyError, TypeError):
        return False


def open_checkpoint(
    folder: str | Path, shapes: Mapping[str, tuple[int, int]] | None = None, digests: Digests = "none"
) -> Checkpoint:
    """Open `folder` and check its documents, headers and file sizes against each other.

    Every loader opens a folder by this function, `from_pretrained` too. A folder without a report, as
    `save_pretrained` writes it, is opened as far as its tensors describe it.

    Args:
        folder: the folder.
        shapes: layer -> (out, in) of the model, for folders in which neither report nor tensors tell them.
        digests: files to compare with their recorded digests; no tensor is read unless it is "all".

    Raises:
        CheckpointError: a file is missing or damaged, a shard name leaves the folder, a header does not fit its
            file, or there are weights that do not belong to the model.
    """
    folder = user_path(folder)
    for _ in range(_MAX_OPENED):  # a folder that is changed is replaced, and what was read of both is read again
        before = _identity(folder)
        try:
            checkpoint = _open(folder, shapes)
            if digests != "none":
                weights = {path.name for path in checkpoint.files.values()}
                check_digests(folder, checkpoint.record, but=() if digests == "all" else weights)
        except CheckpointError:
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return checkpoint
    raise CheckpointError(f"{folder} was replaced {_MAX_OPENED} times while it was opened; open it again later.")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what distinguishes a folder from another one of its name; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open(folder: Path, shapes: Mapping[str, tuple[int, int]] | None) -> Checkpoint:
    """Do what `open_checkpoint` does, in a folder that stays as it is."""
    check_not_interrupted(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give one that bitmill quantize wrote.")
    check_regular(folder)
    config = read_json(folder, "config.json")
    check_config(config, folder / "config.json", CheckpointError)
    report = read_report(folder)
    described = config.get("quantization_config")
    if described is None and report.get("kv"):  # weights were left as they are
        described = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "groups": []}
    if not isinstance(described, dict):
        raise CheckpointError(f"{folder} holds a float model (no quantization_config); quantize it first.")
    formats, places = _formats(described), shared_paths(described)
    ends = layers_outside_blocks(head_config(described))
    listed = {layer["name"]: (layer["shape"][0], layer["shape"][1]) for layer in report.get("layers", [])}
    files, entries, opened = open_tensors(folder)
    if not report:
        report, listed = {"layers": [], "measured": []}, _stored_shapes(folder, formats, entries, shapes or {})
    record, kv = record_of(folder, report), _kv_bytes(folder)
    checkpoint = Checkpoint(
        folder, config, report, formats, files, entries, listed, places, ends, kv, record=record
    )
    checkpoint.check()
    foreign = check_files(folder, record, opened if record else {*opened, KV_FILE, REFERENCE_FILE})
    return replace(checkpoint, foreign=foreign)


def _kv_bytes(folder: Path) -> int:
    if not (folder / KV_FILE).is_file():
        return 0
    try:
        return sum(entry.end - entry.begin for entry in read_header(folder / KV_FILE).values())
    except SourceError as error:
        raise CheckpointError(str(error)) from None


def _formats(described: dict[str, Any]) -> dict[str, Format]:
    try:
        return layer_formats(described)
    except RecipeError as error:  # the same sentence, but it is the folder's fault and not the user's
        raise CheckpointError(str(error)) from None


def _stored_shapes(
    folder: Path,
    formats: Mapping[str, Format],
    entries: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, tuple[int, int]]:
    """Return the shapes of the layers of a folder without a report, by their empty weights or by `shapes`."""
    found = {layer: marked_shape(layer, entries) or shapes.get(layer) for layer in formats}
    if absent := next((layer for layer, shape in found.items() if shape is None), None):
        raise CheckpointError(
            f"{folder}/{REPORT} is missing, and nothing else tells the shape of {absent!r}; copy the folder again."
        )
    return {layer: shape for layer, shape in found.items() if shape is not None}
