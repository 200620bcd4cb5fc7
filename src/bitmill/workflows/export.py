"""Write a quantized folder as a checkpoint that other programs read, without quantizing again."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.architectures.experts import expert_of
from bitmill.checkpoint.contents import REPORT
from bitmill.checkpoint.marker import WEIGHT
from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import NumericsError, OutputError, UsageError
from bitmill.exports.base import TARGETS, Layer, Target
from bitmill.files import folder_bytes, output_errors, publish, write_json, write_tensors, write_text
from bitmill.models.config_only import open_config_only
from bitmill.models.meta import empty_model
from bitmill.progress import Progress
from bitmill.workflows.export_gguf import gguf_layers, write_gguf
from bitmill.workflows.load import load

DENSE, GGUF = "dense", "gguf"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 4 << 30
_OWN = frozenset({REPORT, "recipe.yaml", "report.html", "README.md", "config.json", "kv.safetensors"})


@dataclass(frozen=True)
class Export:
    """The result of `export`; `print` shows a summary.

    Attributes:
        out: the folder.
        to: the target.
        readers: programs that read it.
        size_bytes: of the folder.
        layers: number of layers that are stored quantized.
        notes: what a user should know, a sentence each.
    """

    out: Path
    to: str
    readers: str
    size_bytes: int
    layers: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**vars(self), "out": str(self.out)}

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs to print."""
        rows = [
            ("written to", str(self.out)),
            ("as", f"{self.to}, for {self.readers}"),
            ("size", f"{self.size_bytes / 1e6:.1f} MB"),
            ("quantized layers", f"{self.layers}, equal to the folder's to the bit" if self.layers else "none"),
        ]
        return [*rows, *(("note", note) for note in self.notes)]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.rows())


@checked_arguments("to", "dtype", "progress")
def export(
    folder: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> Export:
    """Write a quantized folder as a checkpoint of another program.

    Codes, scales and zeros are copied; nothing is quantized again. Embedding and head are decoded to float.

    Args:
        folder: a folder that bitmill wrote.
        to: "dense" (an ordinary model in float), "gguf", "gptq", "awq" or "compressed-tensors".
        out: folder to write, a file for "gguf"; without it FOLDER-TO, or FOLDER.gguf, next to the folder.
        dtype: of the tensors in float: "float16", "bfloat16" or "float32"; without it that of the folder's config,
            or float16 where that is float32.
        trust_remote_code: allow Python code in the folder to run.
        progress: True for a live line, False for none, or a `Progress`.

    Returns:
        The place, size, and notes.

    Raises:
        UsageError: the target cannot hold a layer, or does not exist.
        OutputError: the folder to write exists.
    """
    checkpoint = open_checkpoint(folder, digests="all")
    place = _place(checkpoint, to, out)
    stored = _dtype(checkpoint, dtype)
    progress = progress if isinstance(progress, Progress) else Progress()
    if to == GGUF:
        return _export_gguf(checkpoint, place, trust_remote_code, progress)
    target = None if to == DENSE else _target(to)
    layers = {} if target is None else _layers(checkpoint, target)
    with _scratch_folder(place) as scratch:
        if target is None:
            notes = _write_dense(checkpoint, scratch, stored, trust_remote_code)
        else:
            notes = target.notes(layers)
            _write(checkpoint, target, layers, scratch, stored, trust_remote_code, progress)
        _copy_rest(checkpoint, scratch)
        write_text(scratch / "README.md", _card(checkpoint, to, target))
        scratch.chmod(0o755)
        publish(scratch, place)
    readers = "any program that reads models in float" if target is None else target.readers
    return Export(place, to, readers, folder_bytes(place), len(layers), notes)


def _export_gguf(checkpoint: Checkpoint, place: Path, trust_remote_code: bool, progress: Progress) -> Export:
    layers = gguf_layers(checkpoint)
    with _scratch_folder(place) as scratch:
        notes = write_gguf(checkpoint, layers, scratch / place.name, trust_remote_code, progress)
        publish(scratch / place.name, place)
    return Export(place, GGUF, "llama.cpp and programs built on it", place.stat().st_size, len(layers), notes)


def _place(checkpoint: Checkpoint, to: str, out: str | Path | None) -> Path:
    """Return the folder or file to write. Raises OutputError where it exists."""
    own = checkpoint.folder.resolve()
    ending = ".gguf" if to == GGUF else f"-{to}"
    place = user_path(out) if out is not None else own.with_name(own.name + ending)
    if place.exists() or place.is_symlink():
        raise OutputError(f"{place} exists already; remove it, or choose another place with -o.")
    return place


@contextmanager
def _scratch_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder next to a place, which is removed in the end."""
    with output_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _target(name: str) -> Target:
    names = [DENSE, GGUF, *sorted(TARGETS.names())]
    if name not in names:
        raise UsageError(f"There is no export {name!r}; choose one of {', '.join(names)}.")
    return TARGETS.get(name)()


def _dtype(checkpoint: Checkpoint, name: str | None) -> torch.dtype:
    """Return the type of tensors in float."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"dtype is {name!r}; use one of {', '.join(DTYPES)}.")
        return DTYPES[name]
    stated = DTYPES.get(str(checkpoint.config.get("dtype")), torch.float16)
    return torch.float16 if stated is torch.float32 else stated


def _layers(checkpoint: Checkpoint, target: Target) -> dict[str, Layer]:
    """Return the layers of the blocks. Raises UsageError for one that the target cannot hold."""
    advice = f"or use --to {DENSE}, which decodes all layers"
    layers = {
        name: Layer(format, checkpoint.shape(name))
        for name, format in checkpoint.formats.items()
        if name not in checkpoint.outside
    }
    if not layers:
        raise UsageError(f"{checkpoint.folder} has no quantized layer in its blocks; use --to {DENSE}.")
    for name, layer in layers.items():
        reason = target.unsupported_reason(layer)
        if expert_of(name):
            reason = "the experts of a fused tensor are not exported quantized yet"
        if reason:
            raise UsageError(f"{target.name} cannot hold the layer {name!r}: {reason}; {advice}.")
    if reason := target.mixed_reason(layers):
        raise UsageError(f"{checkpoint.folder} cannot be one {target.name} checkpoint: {reason}, {advice}.")
    return layers


def _write_dense(checkpoint: Checkpoint, out: Path, dtype: torch.dtype, trust_remote_code: bool) -> list[str]:
    """Write a model in float, as transformers saves it; returns the notes."""
    model: Any = load(checkpoint.folder, dtype=dtype, dense=True, trust_remote_code=trust_remote_code)
    model.save_pretrained(out)
    if any(format.quantizes_inputs for format in checkpoint.formats.values()):
        return ["Inputs of layers that the folder rounds are not rounded in the export."]
    return []


def _write(
    checkpoint: Checkpoint,
    target: Target,
    layers: dict[str, Layer],
    out: Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """Write shards, index and config of a target."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    index: dict[str, int] = {}
    progress.start("export", len(layers))
    for name, tensor in _tensors(checkpoint, target, layers, dtype, progress):
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        index[name] = len(shards)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    progress.finish()
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, tensors in zip(files, shards):
        write_tensors(out / file, tensors)
    if len(shards) > 1:
        weight_map = {name: files[number - 1] for name, number in sorted(index.items())}
        write_json(
            out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    model = empty_model(open_config_only(checkpoint.folder, trust_remote_code=trust_remote_code))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    described = target.config(layers, [name for name in linears if name not in layers])
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "dtype")}
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": described}
    write_json(out / "config.json", config)
    for file, document in target.files(described).items():
        write_json(out / file, document)


def _tensors(
    checkpoint: Checkpoint, target: Target, layers: dict[str, Layer], dtype: torch.dtype, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the target by name.

    Raises:
        NumericsError: a reader of the target would decode other numbers, or a tensor is beyond the range of dtype.
    """
    packed = {f"{name}.{WEIGHT}" for name in checkpoint.formats}
    for name, format in checkpoint.formats.items():
        packed |= {f"{name}.{part}" for part in format.layout(checkpoint.shape(name))}
        quantized = checkpoint.quantized(name)
        if name not in layers:
            yield f"{name}.weight", _in_float(f"{name}.weight", quantized.dequantize(), dtype)
            continue
        tensors = target.tensors(quantized)
        if not torch.equal(target.decode(tensors, layers[name]), quantized.dequantize()):
            raise NumericsError(f"The layer {name!r} would decode to other numbers as {target.name}; report this.")
        yield from ((f"{name}.{part}", tensor) for part, tensor in tensors.items())
        progress.advance()
    for name in checkpoint.entries:
        if name not in packed:
            tensor = checkpoint.tensor(name)
            yield name, _in_float(name, tensor, dtype) if tensor.is_floating_point() else tensor


def _in_float(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the type of the export. Raises NumericsError where it is beyond its range."""
    cast = tensor.to(dtype)
    if bool(torch.isfinite(cast).all()):
        return cast
    raise NumericsError(f"{name} reaches {float(tensor.abs().amax()):.3g}, beyond {dtype}; use --dtype bfloat16.")


def _copy_rest(checkpoint: Checkpoint, out: Path) -> None:
    """Copy tokenizer, chat template and other files of the model."""
    for path in sorted(checkpoint.folder.iterdir()):
        weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if path.is_file() and path.name not in _OWN and not weights and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def _card(checkpoint: Checkpoint, to: str, target: Target | None) -> str:
    """Return the model card: the front matter of the folder's, and what this is."""
    card = checkpoint.folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front = text[: text.index("\n---\n", 4) + 5] if text.startswith("---\n") and "\n---\n" in text[4:] else ""
    recipe = json.dumps((checkpoint.report.get("recipe") or {}).get("name"))
    readers = "any program that reads models in float" if target is None else target.readers
    return (
        f"{front}\nWritten by bitmill from a quantized folder (recipe {recipe}), as {to}, for {readers}. "
        "The numbers of its quantized layers are those that bitmill measured; embedding and head are in float.\n"
    )
