"""Bytes of a folder before it is quantized: those of every file, from names, shapes and types.

Tensors, their headers, the index and the files that are copied are exact. report.json and the documents made from
it hold measured numbers, whose digits are not known before: the sizes of these files are those with the numbers of
the probe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitmill.calibration.token_windows import JobData
from bitmill.checkpoint.marker import WEIGHT
from bitmill.evaluation.reference import FILE as REFERENCE_FILE
from bitmill.evaluation.reference import reference_layout
from bitmill.formats.base import Layout
from bitmill.formats.quantized import shared_module_path
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.report.html import folder_documents
from bitmill.sources.safetensors_header import DTYPES
from bitmill.workflows.job_report import job_report
from bitmill.workflows.prepare import PreparedJob

INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8  # of the number before a header, to whose multiple the header is padded
# the order of types in a file, from first to last, as in the library's source (names break ties)
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class ProbedFolder:
    """The parts of a folder that a probe on some of its blocks has found.

    Attributes:
        files: name -> record of the files that do not depend on the number of blocks.
        layers: entries of report.json of the probed layers.
        quality: figures measured while quantizing.
        running: figures of the packed model; None where it was not run.
    """

    files: dict[str, dict[str, Any]]
    layers: list[dict[str, Any]]
    quality: dict[str, Any]
    running: dict[str, Any] | None


def folder_size(prepared: PreparedJob, data: JobData, identity: dict[str, Any], probed: ProbedFolder) -> int:
    """Return the bytes of all files of the folder together.

    Args:
        prepared: the job, with a recipe.
        data: the tokens that calibrate and that measure.
        identity: everything that decides the bytes of the result.
        probed: the parts that a probe has found.
    """
    assert prepared.resolved is not None
    sizes = _weight_files(prepared.streamed, prepared.resolved)
    if probed.running and data.held_out is not None:
        layout = reference_layout(data.held_out, _vocabulary(prepared.streamed))
        sizes[REFERENCE_FILE] = file_size(layout)
    sizes |= {name: record["size_bytes"] for name, record in probed.files.items()}
    each = {name: {"windows": count, **probed.quality} for name, count in data.domains.items()}
    report = job_report(prepared, data, identity, probed.quality | ({"domains": each} if each else {}))
    report["layers"] = _layers(prepared.streamed, prepared.resolved, probed.layers)
    report |= {"running": probed.running} if probed.running else {}
    documents = folder_documents(report)
    record = next(iter(probed.files.values()))
    report["files"] = {name: {**record, "size_bytes": sizes[name]} for name in sorted(sizes)}
    written = [_json(report), *(text.encode(errors="backslashreplace") for text in documents.values())]
    return sum(sizes.values()) + sum(map(len, written)) + prepared.kv_bytes


def weight_files_bytes(streamed: StreamedModel, resolved: ResolvedRecipe) -> int:
    """Return the bytes of all files of weights together: tensors, headers and the index."""
    return sum(_weight_files(streamed, resolved).values())


def _weight_files(streamed: StreamedModel, resolved: ResolvedRecipe) -> dict[str, int]:
    """Return name -> bytes of the files of weights and of their index."""
    shards = _shards(streamed, resolved)
    sizes = {name: file_size(tensors) for name, tensors in shards.items()}
    total = sum(_tensor_bytes(tensors) for tensors in shards.values())
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {**sizes, INDEX: len(_json(index))}


def file_size(tensors: Layout) -> int:
    """Return the bytes of a safetensors file with these tensors, as this program writes it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(names[tensors[name][1]]), name)):
        shape, dtype = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    padded = -(-length // _LENGTH_BYTES) * _LENGTH_BYTES
    return _LENGTH_BYTES + padded + end


def _shards(streamed: StreamedModel, resolved: ResolvedRecipe) -> dict[str, Layout]:
    """Return the tensors of every file of weights."""
    ends = resolved.ends
    outside = {name: ends.shape(name, streamed) for name in resolved.head_layers if ends}
    shards = [_shard(streamed, resolved, streamed.non_block_tensors(), outside, ends.weights if ends else ())]
    shared: Layout = {}
    for index in range(len(streamed.blocks)):
        sites = [site for site in streamed.sites(index) if site.layer in resolved.formats]
        shapes = {site.layer: site.shape for site in sites}
        packed = [site.path for site in sites]
        shards.append(_shard(streamed, resolved, streamed.block_tensors(index), shapes, packed))
        for layer in shapes:
            place = shared_module_path(layer.removeprefix(f"{streamed.block_name(index)}."))
            shared |= {f"{place}.{part}": e for part, e in resolved.formats[layer].shared_layout().items()}
    shards += [shared] if shared else []
    return {
        f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors": tensors
        for number, tensors in enumerate(shards)
    }


def _shard(
    streamed: StreamedModel,
    resolved: ResolvedRecipe,
    names: Iterable[str],
    layers: Mapping[str, tuple[int, ...]],
    packed: Iterable[str],
) -> Layout:
    """Return the tensors of one file: packed layers by name, with their shapes, and the others of `names`."""
    tensors: Layout = {}
    for layer, (rows, columns) in layers.items():
        own = resolved.formats[layer].own_layout((rows, columns))
        tensors |= {f"{layer}.{part}": entry for part, entry in own.items()}
        tensors[f"{layer}.{WEIGHT}"] = ((0, rows, columns), torch.float16)
    left_out = set(packed)
    return tensors | {name: (streamed.shape(name), streamed.dtype(name)) for name in names if name not in left_out}


def _tensor_bytes(tensors: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def _layers(
    streamed: StreamedModel, resolved: ResolvedRecipe, probed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the entries of report.json of all layers, each like that of the probed layer of its shape."""
    known = {(entry["format"], tuple(entry["shape"])): entry for entry in probed}
    entries = []
    for site in streamed.all_sites():
        if (format := resolved.formats.get(site.layer)) is not None:
            entries.append({**known.get((format.name, tuple(site.shape)), probed[-1]), "name": site.layer})
    outside = [entry for entry in probed if entry["name"] in resolved.head_layers]
    return [*outside, *entries]


def _vocabulary(streamed: StreamedModel) -> int:
    return int(streamed.source.config.get_text_config().vocab_size)


def _json(data: Any) -> bytes:
    """Return the bytes that `write_json` writes."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
