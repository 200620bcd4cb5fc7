"""Bring a checkpoint that another program quantized into a folder, without quantizing again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.calibration.token_windows import JobData
from bitmill.checkpoint.overwrite import check_output
from bitmill.checkpoint.work_folder import SUFFIX_BYTES, WorkFolder
from bitmill.checkpoint.writer import FolderSink
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import OutputError, SourceError
from bitmill.files import folder_bytes
from bitmill.formats import Format, GroupFormat
from bitmill.formats.quantized import Quantized
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.models.embedding_and_head import EmbeddingAndHead, find_embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import NON_BLOCK, BlockResult, LayerResult
from bitmill.progress import Progress
from bitmill.recipes.inputs import FLOAT, Inputs
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.recipes.rules import Rule
from bitmill.recipes.scheme import LayerScheme
from bitmill.report.html import folder_documents
from bitmill.report.text import format_rows
from bitmill.solvers.nearest import Nearest
from bitmill.workflows.checks import check_space, job_identity
from bitmill.workflows.imports.packed import PackedSource, open_packed
from bitmill.workflows.job_report import job_report
from bitmill.workflows.prepare import PreparedJob, QuantizeRequest
from bitmill.workflows.sizes import storage_plan


@dataclass(frozen=True)
class Import:
    """The result of `import_checkpoint`; `print` shows a summary.

    Attributes:
        out: the folder.
        program: kind of the checkpoint, such as "gptq" or "gguf".
        layers: number of quantized layers, embedding and head among them.
        bits_per_weight: of the layers in the blocks.
        size_bytes: of the folder.
        notes: what a user should know, a sentence each.
    """

    out: Path
    program: str
    layers: int
    bits_per_weight: float
    size_bytes: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**vars(self), "out": str(self.out)}

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs to print."""
        rows = [
            ("written to", str(self.out)),
            ("from", self.program),
            ("quantized layers", f"{self.layers}, equal to the checkpoint's to the bit"),
            ("bits per weight", f"{self.bits_per_weight:.3f}"),
            ("size", f"{self.size_bytes / 1e6:.1f} MB"),
        ]
        return [*rows, *(("note", note) for note in self.notes)]

    def __str__(self) -> str:
        return format_rows(self.rows())


@checked_arguments("progress")
def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> Import:
    """Write a folder of bitmill from a checkpoint that another program quantized.

    Codes, scales and zeros are copied; nothing is quantized again.

    Args:
        source: a folder of GPTQ, AWQ, compressed-tensors, bitsandbytes (NF4), fp8, ModelOpt or MLX, or a .gguf
            file.
        out: folder to write.
        overwrite: replace a folder that bitmill wrote.
        trust_remote_code: allow Python code in the folder to run.
        progress: True for a live line, False for none, or a `Progress`.

    Returns:
        The place, bits and size, and notes.

    Raises:
        SourceError: the checkpoint is damaged, or holds numbers that no format stores to the bit.
        OutputError: the folder to write exists.
    """
    place = user_path(out, SUFFIX_BYTES)
    check_output(place, overwrite)
    progress = progress if isinstance(progress, Progress) else Progress()
    opened = open_packed(source, trust_remote_code)
    streamed = StreamedModel(opened)
    found = _Matrices(opened, streamed)
    resolved = _resolved(opened.program, streamed, found)
    prepared = _prepared(source, place, overwrite, trust_remote_code, progress, streamed, resolved)
    check_space(place, prepared.plan["size_bytes"])
    work = WorkFolder(place)
    try:
        identity = job_identity(opened, resolved.recipe, JobData(), "cpu")
        sink = FolderSink(work, resolved, identity, len(streamed.blocks), False, overwrite)
        sink.prepare(streamed)
        _write(sink, streamed, resolved, found, progress)
        report = job_report(prepared, JobData(), identity, {})
        report |= {"layers": sink.layers, "imported": opened.program}
        sink.complete(streamed)
        sink.finish(report, folder_documents(report))
    except BaseException:
        work.clear()
        raise
    finally:
        work.close()
    notes = [*opened.notes(), *found.notes(resolved)]
    bits = prepared.plan["bits_per_weight"]
    return Import(place, opened.program, len(sink.layers), bits, folder_bytes(place), notes)


class _Matrices:
    """The quantized matrices of a source, by layer of the model."""

    def __init__(self, source: PackedSource, streamed: StreamedModel) -> None:
        self._source, self._streamed, self._packed = source, streamed, source.packed()
        self.formats = {
            site.layer: format for site in streamed.all_sites() if (format := self._format(site.path)) is not None
        }
        if not self.formats:
            raise SourceError(f"{source.name} has no quantized layer in its blocks; quantize it instead.")
        ends = find_embedding_and_head(streamed)
        self.ends: EmbeddingAndHead | None = None
        self.outside: dict[str, Format] = {}
        self._stored = {site.layer: site.path for site in streamed.all_sites()}
        if isinstance(ends, EmbeddingAndHead):
            stored = {layer: ends.stored_name(layer, streamed) for layer in ends.layers}
            formats = {layer: self._format(name) for layer, name in stored.items()}
            self.outside = {layer: f for layer, f in formats.items() if isinstance(f, GroupFormat)}
            kept = ends.only(self.outside)
            self.ends = kept if self.outside else None
            self._stored |= stored

    def _format(self, name: str) -> Format | None:
        """Return the format of a matrix of the model; None where it is in float."""
        parts = self._streamed.stored_parts(name)
        if not any(part in self._packed for part in parts):
            return None
        return self._read(name).format

    def quantized(self, layer: str) -> Quantized:
        """Read the matrix of a layer."""
        return self._read(self._stored[layer])

    def _read(self, name: str) -> Quantized:
        """Read a matrix, which transformers may join of several that are stored. Raises SourceError."""
        parts = self._streamed.stored_parts(name)
        if not all(part in self._packed for part in parts):
            raise SourceError(f"{name!r} is made of quantized and float tensors, such as {parts[0]!r}.")
        made = [self._source.quantized(part) for part in parts]
        if len({(each.format, each.shape[1]) for each in made}) > 1:
            raise SourceError(f"{name!r} is made of tensors of several formats, such as {parts[0]!r}.")
        joined = made[0] if len(made) == 1 else _joined(made)
        if len(made) > 1 or self._source.as_saved:
            self._check(name, joined)
        return joined

    def _check(self, name: str, quantized: Quantized) -> None:
        """Raise SourceError unless a matrix decodes to what transformers would make of the float tensors."""
        stored = self._streamed.stored_tensor(name)
        decoded = quantized.dequantize().to(stored.dtype)
        transposed = self._streamed.adapter.transposed and stored.shape != decoded.shape
        if not torch.equal(decoded.T if transposed else decoded, stored):
            raise SourceError(f"{name!r} is stored in another order than the model has it, and is not imported.")

    def notes(self, resolved: ResolvedRecipe) -> list[str]:
        """Return the matrices that are decoded, because no layer of a block, embedding or head holds them."""
        taken = {part for layer in resolved.formats for part in self._streamed.stored_parts(self._stored[layer])}
        left = sorted(self._packed - taken - set(self._streamed.unused))
        if not left:
            return []
        return [f"{len(left)} quantized matrices outside the blocks are decoded to float, such as {left[0]}."]


def _joined(made: list[Quantized]) -> Quantized:
    """Return matrices of one format on top of each other."""
    params: dict[str, Tensor] = {}
    for name in made[0].params:
        values = [each.params[name] for each in made]
        if values[0].shape[0] != made[0].shape[0] and not all(torch.equal(v, values[0]) for v in values):
            raise SourceError(f"Matrices that belong together have several values of {name!r}.")
        params[name] = torch.cat(values) if values[0].shape[0] == made[0].shape[0] else values[0]
    rows = sum(each.shape[0] for each in made)
    return Quantized(made[0].format, torch.cat([each.codes for each in made]), params, (rows, made[0].shape[1]))


def _scheme(format: Format) -> LayerScheme:
    """Return a scheme whose stored format is `format`."""
    if isinstance(format, QuantizedInputs):
        return LayerScheme(format.inner, Nearest(), inputs=Inputs(format.inputs))
    return LayerScheme(format, Nearest())


def _resolved(program: str, streamed: StreamedModel, found: _Matrices) -> ResolvedRecipe:
    """Return a recipe that gives every layer its format; of a model, rounded to nearest, it makes other codes."""
    counts = Counter[Format]()
    for site in streamed.all_sites():
        if site.layer in found.formats:
            counts[found.formats[site.layer]] += prod(site.shape)
    common = _scheme(counts.most_common(1)[0][0])
    schemes = {s.layer: _scheme(found.formats[s.layer]) if s.layer in found.formats else None
               for s in streamed.all_sites()}  # fmt: skip
    floats = [Rule(layer, FLOAT) for layer, scheme in schemes.items() if scheme is None]
    rules = [_rule(layer, scheme, common) for layer, scheme in schemes.items() if scheme and scheme != common]
    heads = list(dict.fromkeys(found.outside.values()))
    head = heads[0] if len(heads) == 1 else None
    rules += [Rule(layer, format) for layer, format in found.outside.items() if head is None]
    recipe = Recipe(
        f"imported-{program}", common.weight, common.solver, rules=(*floats, *rules), inputs=common.inputs,
        head=head if found.outside else FLOAT,
    )  # fmt: skip
    return ResolvedRecipe(recipe, schemes, found.ends, found.outside)


def _rule(layer: str, scheme: LayerScheme, common: LayerScheme) -> Rule:
    inputs = None if scheme.inputs == common.inputs else scheme.inputs or FLOAT
    return Rule(layer, scheme.weight, inputs=inputs)


def _prepared(
    source: str | Path,
    place: Path,
    overwrite: bool,
    trust_remote_code: bool,
    progress: Progress,
    streamed: StreamedModel,
    resolved: ResolvedRecipe,
) -> PreparedJob:
    """Return the job as `quantize` has it, for its report."""
    request = QuantizeRequest(
        source, place, None, 0, "cpu", False, overwrite, False, "quantized", None, None, None, trust_remote_code,
        progress,
    )  # fmt: skip
    plan = {**storage_plan(streamed, resolved), "source_types": [], "kv": None}
    return PreparedJob(request, streamed, resolved, None, plan)


def _write(
    sink: FolderSink, streamed: StreamedModel, resolved: ResolvedRecipe, found: _Matrices, progress: Progress
) -> None:
    """Write embedding and head, where they are quantized, then every block."""
    sink.begin()
    if found.outside:
        outside = {layer: LayerResult(found.quantized(layer), None, None) for layer in found.outside}
        sink.write(BlockResult(NON_BLOCK, outside), streamed)
    progress.start("import", len(streamed.blocks))
    for index in range(len(streamed.blocks)):
        layers = [site.layer for site in streamed.sites(index) if resolved.schemes[site.layer]]
        made = {layer: LayerResult(_storable(layer, found.quantized(layer)), None, None) for layer in layers}
        sink.write(BlockResult(index, made), streamed)
        progress.advance()
    progress.finish()


def _storable(layer: str, quantized: Quantized) -> Quantized:
    """Return a matrix. Raises OutputError unless its packed tensors decode to it, and can be opened again."""
    stored = quantized.pack()
    codes, params = quantized.format.unpack(stored, quantized.shape)
    read = Quantized(quantized.format, codes, params, quantized.shape)
    reason = quantized.format.damage_reason(stored, quantized.shape)
    if reason or not torch.equal(read.dequantize(), quantized.dequantize()):
        raise OutputError(f"The layer {layer!r} cannot be stored ({reason or 'it decodes to other numbers'}).")
    return quantized
