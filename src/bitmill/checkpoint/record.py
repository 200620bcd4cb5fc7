"""Add a measurement or a KV calibration to a finished folder, its report, its card and its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.work_folder import changed_folder, check_changeable
from bitmill.errors import CheckpointError, one_line
from bitmill.files import file_record, write_json, write_text
from bitmill.kv.calibration_file import FILE, KVCalibration
from bitmill.report.html import folder_documents
from bitmill.report.metrics import CLASS_METRICS, EMBEDDING_METRICS, LANGUAGE_METRICS

# Time and memory belong to the machine, not to the model, and are left out.
_KEPT = (
    "text",
    "split",
    "seqlen",
    "windows",
    "windows_per_domain",
    "part",
    "separator",
    "prefix",
    "tokens",
    "pooling",
    "unit",
    "labels",
    *(metric.key for metric in LANGUAGE_METRICS + EMBEDDING_METRICS + CLASS_METRICS),
    "kl_interval",
    "knn_change_interval",
    "accuracy_change_interval",
    "domains",
    "reference",
    "kv_method",
    "kv_options",
    "kv_calibration",
    "kv_on_calibration_text",
    "kv_bits_per_element",
    "kv_table_bytes",
)
_SAME = ("by", "text", "split", "seqlen", "windows", "reference", "kv_method", "kv_options")


def check_recordable(folder: Path) -> dict[str, Any]:
    """Check that a measurement or a calibration can be recorded, before it is made.

    Args:
        folder: the quantized folder.

    Returns:
        The digests of its files, for `record_measurement` and `record_calibration`.

    Raises:
        CheckpointError: the report is damaged.
        OutputError: the folder cannot be changed.
    """
    check_changeable(folder)
    report = open_checkpoint(folder).report
    report_documents(folder, report)
    return dict(report.get("files", {}))


def record_measurement(folder: Path, result: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Append the result of `bitmill.evaluate` to the report; an equal measurement is replaced.

    Answers to prompts, next to those of the reference, replace earlier ones.

    Args:
        folder: the quantized folder.
        result: the result of `bitmill.evaluate`.
        files: digests of the files that were measured; those of now where it is left out.

    Raises:
        CheckpointError: the report is damaged, or the files are not those that were measured.
        OutputError: the folder cannot be written.
    """
    entry = {"by": "eval", **{key: result[key] for key in _KEPT if result.get(key) is not None}}
    with changed_folder(folder) as new:
        report = open_checkpoint(folder).report  # which nobody else changes meanwhile
        _check_unchanged(folder, report, files)
        kept = [m for m in report["measured"] if any(m.get(key) != entry.get(key) for key in _SAME)]
        rewrite_report(new, {**report, "measured": [*kept, entry], **_answers(result)})


def _answers(result: dict[str, Any]) -> dict[str, Any]:
    """Return the report's entry `samples`; nothing where no prompt was answered by both models."""
    samples = [sample for sample in result.get("samples", []) if "reference_answer" in sample]
    return {"samples": samples} if samples else {}


def record_tasks(folder: Path, result: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Add the result of `bitmill.evaluate_tasks` to the report; earlier figures of these tasks are replaced.

    Args:
        folder: the quantized folder.
        result: the result of `bitmill.evaluate_tasks`, with the name of the float model in `reference`.
        files: digests of the files that were measured; those of now where it is left out.

    Raises:
        CheckpointError: the report is damaged, or the files are not those that were measured.
        OutputError: the folder cannot be written.
    """
    reference = {} if result.get("reference") is None else {"reference": str(result["reference"])}
    entries = {name: {**figures, **reference} for name, figures in result["tasks"].items()}
    with changed_folder(folder) as new:
        report = open_checkpoint(folder).report
        _check_unchanged(folder, report, files)
        rewrite_report(new, {**report, "tasks": {**report.get("tasks", {}), **entries}})


def _check_unchanged(folder: Path, report: dict[str, Any], files: dict[str, Any] | None) -> None:
    """Raise CheckpointError where a report records other files than `files`."""
    if files is not None and report.get("files", {}) != files:
        raise CheckpointError(f"{folder} was changed while it was measured; measure it again.")


def record_calibration(
    folder: Path, calibration: KVCalibration, kv: dict[str, Any], files: dict[str, Any] | None = None
) -> None:
    """Add a KV calibration to a finished folder, in place of an earlier one.

    Args:
        folder: the folder; it is replaced in one step, see `changed_folder`.
        calibration: the calibration.
        kv: the report's entry on keys and values.
        files: digests of the files it was calibrated on; those of now where it is left out.

    Raises:
        CheckpointError: the report is damaged, or the files are not those that it was calibrated on.
        OutputError: the folder cannot be written.
    """
    with changed_folder(folder) as new:
        _check_unchanged(folder, open_checkpoint(folder).report, files)
        add_calibration(new, calibration, kv)


def add_calibration(folder: Path, calibration: KVCalibration, kv: dict[str, Any]) -> None:
    """Add a KV calibration to a folder that has no name of its own yet.

    Measurements through a packed cache are removed from the report.

    Args:
        folder: the folder.
        calibration: the calibration.
        kv: the report's entry on keys and values.

    Raises:
        CheckpointError: the report is damaged.
        OutputError: the folder cannot be written.
    """
    checkpoint = open_checkpoint(folder)
    calibration.save(folder)
    checkpoint = replace(checkpoint, kv_bytes=sum(t.nbytes for t in calibration.tensors().values()))
    report = {**checkpoint.report, "bits_per_weight": checkpoint.bits_per_weight, "kv": kv}
    report["files"] = {**report.get("files", {}), FILE: file_record(folder / FILE)}
    report["measured"] = [m for m in report["measured"] if m.get("kv_method") is None]
    rewrite_report(folder, report)


def rewrite_report(folder: Path, report: dict[str, Any]) -> None:
    """Write a report, and the documents made from it, into a folder that has no name of its own yet."""
    documents = report_documents(folder, report)
    write_json(folder / "report.json", report)
    for name, text in documents.items():
        write_text(folder / name, text)


def report_documents(folder: Path, report: dict[str, Any]) -> dict[str, str]:
    """Return the documents of a report. Raises CheckpointError for a report that lacks what they need."""
    try:
        return folder_documents(report)
    except Exception as error:  # the templates meet whatever the report lacks
        raise CheckpointError(f"{folder}/report.json is incomplete ({one_line(error)}); quantize again.") from None
