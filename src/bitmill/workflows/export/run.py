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

from bitmill.checkpoint.contents import REPORT
from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import OutputError, UsageError
from bitmill.exports.base import TARGETS
from bitmill.files import folder_bytes, output_errors, publish, write_text
from bitmill.progress import Progress
from bitmill.report.text import format_rows
from bitmill.workflows.export.dense import DenseWriter
from bitmill.workflows.export.gguf_file import GgufWriter
from bitmill.workflows.export.job import ExportJob, Writer
from bitmill.workflows.export.packed import PackedWriter

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_WRITERS: tuple[type[Writer], ...] = (DenseWriter, GgufWriter)  # besides those of targets
_OWN = frozenset({REPORT, "recipe.yaml", "report.html", "README.md", "config.json"})


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
        return format_rows(self.rows())


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
        to: "dense" (an ordinary model in float), "gguf", "gptq", "awq", "compressed-tensors" or
            "mlx".
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
    writer = _writer(to)
    checkpoint = open_checkpoint(folder, digests="all")
    place = _place(checkpoint, writer, out)
    progress = progress if isinstance(progress, Progress) else Progress()
    job = ExportJob(checkpoint, _dtype(checkpoint, dtype), trust_remote_code, progress)
    layers = writer.check(job)
    with _scratch_folder(place) as scratch:
        made = scratch / place.name if writer.is_file else scratch
        notes = writer.write(job, layers, made)
        if not writer.is_file:
            _copy_rest(checkpoint, scratch)
            write_text(scratch / "README.md", _card(checkpoint, writer))
            scratch.chmod(0o755)
        size = made.stat().st_size if writer.is_file else folder_bytes(made)
        publish(made, place)
    if checkpoint.report.get("kv"):
        notes = [*notes, "Keys and values, which the folder packs, are in float in the export."]
    return Export(place, to, writer.readers, size, len(layers), notes)


def _writer(to: str) -> Writer:
    """Return the writer of a name. Raises UsageError where there is none."""
    own = {kind.name: kind for kind in _WRITERS}
    if to in own:
        return own[to]()
    if to not in TARGETS.names():
        raise UsageError(
            f"There is no export {to!r}; choose one of {', '.join([*own, *sorted(TARGETS.names())])}."
        )
    return PackedWriter(TARGETS.get(to)())


def _place(checkpoint: Checkpoint, writer: Writer, out: str | Path | None) -> Path:
    """Return the folder or file to write. Raises OutputError where it exists, or is inside the exported folder."""
    own = checkpoint.folder.resolve()
    place = user_path(out) if out is not None else own.with_name(own.name + writer.ending)
    if place.exists() or place.is_symlink():
        raise OutputError(f"{place} exists already; remove it, or choose another place with -o.")
    if place.resolve().is_relative_to(own):
        raise OutputError(f"{place} is inside the folder that is exported; choose another place with -o.")
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


def _dtype(checkpoint: Checkpoint, name: str | None) -> torch.dtype:
    """Return the type of tensors in float."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"dtype is {name!r}; use one of {', '.join(DTYPES)}.")
        return DTYPES[name]
    stated = DTYPES.get(str(checkpoint.config.get("dtype")), torch.float16)
    return torch.float16 if stated is torch.float32 else stated


def _copy_rest(checkpoint: Checkpoint, out: Path) -> None:
    """Copy tokenizer, chat template and other files of the model."""
    for path in sorted(checkpoint.folder.iterdir()):
        weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if path.is_file() and path.name not in _OWN and not weights and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def _card(checkpoint: Checkpoint, writer: Writer) -> str:
    """Return the model card: the front matter of the folder's, and what this is."""
    card = checkpoint.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = text[: text.index("\n---\n", 4) + 5] if text.startswith("---\n") and "\n---\n" in text[4:] else ""
    recipe = json.dumps((checkpoint.report.get("recipe") or {}).get("name"))
    return (
        f"{front}\nWritten by bitmill from a quantized folder (recipe {recipe}), as {writer.name}, for "
        f"{writer.readers}. "
        "The numbers of its quantized layers are those that bitmill measured; embedding and head are in float.\n"
    )
