"""Write a copy of a quantized folder whose continuous parameters were trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.checkpoint.record import report_documents, rewrite_report
from bitmill.errors import CheckpointError
from bitmill.evaluation.reference import FILE as REFERENCE_FILE
from bitmill.files import file_record, output_errors, write_tensors

_OF_EARLIER_WEIGHTS = ("running", "samples", "tasks")  # entries of the report


def check_report(folder: Path, report: dict[str, Any]) -> None:
    """Raise CheckpointError for a report from which the documents of a folder cannot be written."""
    if not report.get("source"):
        raise CheckpointError(f"{folder} has no report.json of bitmill quantize; quantize the model again.")
    report_documents(folder, report)


def copy_trained(
    checkpoint: Checkpoint,
    new: Path,
    tensors: Mapping[str, Tensor],
    training: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """Write a copy of a folder with other values of some tensors, to a place that has no name of its own yet.

    Measurements of the folder are left out, and errors of the layers that were trained: they are not of the copy.

    Args:
        checkpoint: the folder.
        new: the copy.
        tensors: name -> tensor of the shape and type that the folder stores.
        training: the report's entry on the training.
        identity: everything that decided its result.

    Raises:
        OutputError: the copy cannot be written.
    """
    shards = {checkpoint.files[name] for name in tensors}
    with output_errors(new):
        shutil.copytree(
            checkpoint.folder,
            new,
            ignore=lambda place, names: [name for name in names if Path(place, name) in shards],
            ignore_dangling_symlinks=True,
        )
    report = dict(checkpoint.report)
    report["files"] = dict(report.get("files", {}))
    for shard in sorted(shards):
        held = load_file(shard)
        write_tensors(new / shard.name, {name: tensors.get(name, tensor) for name, tensor in held.items()})
        report["files"][shard.name] = file_record(new / shard.name)
    changed = {name.rpartition(".")[0] for name in tensors}
    of_float = {"weight_error": None, "output_error": None}
    report["layers"] = [{**layer, **(of_float if layer["name"] in changed else {})} for layer in report["layers"]]
    if "trained" in report:  # the folder was trained before
        training = {**training, "earlier": report["trained"]}
        identity = {**identity, "earlier": report["identity"].get("trained")}
    report |= {"measured": [], "trained": training, "identity": {**report["identity"], "trained": identity}}
    for stale in _OF_EARLIER_WEIGHTS:
        report.pop(stale, None)
    rewrite_report(new, report)


def add_running(folder: Path, running: dict[str, Any] | None) -> None:
    """Record how a folder that has no name of its own yet runs; None removes the predictions it was compared with.

    Raises:
        OutputError: the folder cannot be written.
    """
    report = open_checkpoint(folder).report
    if running is None:
        (folder / REFERENCE_FILE).unlink(missing_ok=True)
        report["files"].pop(REFERENCE_FILE, None)
        rewrite_report(folder, report)
    else:
        rewrite_report(folder, {**report, "running": running})
