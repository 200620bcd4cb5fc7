"""bitmill inspect and bitmill verify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, Device, QuantizedFolder, TrustRemoteCode
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.report.describe import describe_training
from bitmill.report.text import describe_kv_plan, describe_measurement, format_mb

MAX_FOREIGN = 8  # names shown of files that are not part of the quantized model

Quality = Annotated[
    bool, typer.Option("--quality/--no-quality", help="Repeat the recorded measurement and compare.")
]


def inspect(folder: QuantizedFolder, as_json: AsJson = False) -> None:
    """List the tensors of a quantized folder, with formats and bits."""
    with command_output(as_json) as output:
        from bitmill.checkpoint.reader import open_checkpoint
        from bitmill.files import folder_bytes

        checkpoint = open_checkpoint(folder)
        tensors = list(checkpoint.layers())
        report = checkpoint.report
        data = {
            "folder": str(folder),
            "source": report.get("source"),
            "bitmill": report.get("bitmill"),
            "bits_per_weight": checkpoint.bits_per_weight,
            "head_bits_per_weight": checkpoint.head_bits_per_weight,
            "size_bytes": sum(tensor["size_bytes"] for tensor in tensors),
            "folder_bytes": folder_bytes(checkpoint.folder),
            "recipe": report.get("recipe"),
            "kv": report.get("kv"),
            "trained": report.get("trained"),
            "measured": report.get("measured", []),
            "recorded": bool(checkpoint.record),
            "foreign": list(checkpoint.foreign),
            "uncompiled": checkpoint.uncompiled_layers(),
            "tensors": tensors,
        }
        output.result(data, lambda: [_tensor_table(tensors), "", _totals(data)])


def verify(
    folder: QuantizedFolder,
    quality: Quality = True,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte and every tensor of a quantized folder, and repeat the recorded measurement."""
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.reader import open_checkpoint
        from bitmill.checkpoint.verify import verify, verify_quality
        from bitmill.report.describe import describe_running
        from bitmill.report.metrics import REFERENCE_FREE
        from bitmill.tasks.base import task_for
        from bitmill.workflows.checks import check_device
        from bitmill.workflows.load import reader_of
        from bitmill.workflows.running import verify_running
        from bitmill.workflows.trial import try_folder

        model: Any = None

        def measure_again(recorded: dict[str, Any]) -> dict[str, Any]:
            return api.evaluate(
                folder if model is None else model,
                tokenizer=reader_of(folder, None, task_for(checkpoint.config), trust_remote_code),
                text=recorded["text"],
                split=recorded["split"],
                seqlen=recorded["seqlen"],
                windows=recorded.get("windows_per_domain") or recorded["windows"],
                device=device,
                progress=output.progress,
                trust_remote_code=trust_remote_code,
            )

        check_device(device)
        checkpoint = open_checkpoint(folder)
        counts = verify(checkpoint, output.progress, device=device, trust_remote_code=trust_remote_code)
        model = try_folder(checkpoint, device, trust_remote_code)
        running = verify_running(checkpoint, model, output.progress) if quality else None
        if not checkpoint.formats:
            model = None  # float weights are read again, as bitmill.load reads them
        change = verify_quality(checkpoint, measure_again) if quality else None
        checked = f"{counts['files']} files, {counts['tensors']} tensors, {counts['layers']} quantized layers"
        rows = [("sound", checked), *_foreign(checkpoint.foreign)]
        if quality:
            result = "nothing was recorded" if change is None else f"as recorded (changed by {change[1]:.2g})"
            rows.append((change[0].replace("_", " ") if change else "perplexity", result))
        if running:
            rows.append(("running", describe_running(running)))
        changes = {f"{key}_change": change[1] if change and change[0] == key else None for key in REFERENCE_FREE}
        data = {
            "folder": str(folder),
            "sound": True,
            "foreign": list(checkpoint.foreign),
            **counts,
            **changes,
            "running": running,
        }
        output.result(data, lambda: [property_table(rows)])


def _tensor_table(tensors: list[dict[str, Any]]) -> Any:
    """Return a table with one row for all tensors that differ only in the number of their block."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for tensor in tensors:
        name = re.sub(r"\.\d+\.", ".*.", tensor["name"])
        shape = " x ".join(str(side) for side in tensor["shape"])
        groups.setdefault((name, tensor["format"], shape), []).append(tensor)
    rows = []
    for (name, format, shape), members in groups.items():
        size = format_mb(sum(member["size_bytes"] for member in members))
        bits = f"{members[0]['bits_per_weight']:.3f}"
        rows.append((name, format, shape, str(len(members)), bits, size))
    columns = ("tensor", "format", "shape", "count", "bits/weight", "size")
    return data_table(columns, rows, left=("tensor", "format"))


def _foreign(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return a row with the files that are not part of the quantized model, none where all are."""
    more = f" and {len(names) - MAX_FOREIGN} more" if len(names) > MAX_FOREIGN else ""
    return [("foreign files", ", ".join(names[:MAX_FOREIGN]) + more)] if names else []


def _totals(data: dict[str, Any]) -> Any:
    recipe = data["recipe"] or {}
    in_blocks = " in the quantized layers of the blocks" if recipe else ""
    rows = [
        ("source", str(data["source"])),
        ("recipe", str(recipe.get("name", "-"))),
        ("bits per weight", f"{data['bits_per_weight']:.3f}{in_blocks}"),
        *(("", f"{bits:.3f} in embedding and head") for bits in [data["head_bits_per_weight"]] if bits),
        ("size", f"{format_mb(data['size_bytes'])} of tensors, {format_mb(data['folder_bytes'])} in total"),
    ]
    if data["kv"]:
        rows.append(("keys and values", describe_kv_plan(data["kv"])))
    if data["trained"]:
        rows.append(("trained", describe_training(data["trained"])))
    if not data["recorded"]:
        rows.append(("record", "none: report.json is missing, so nothing can be verified"))
    rows += _foreign(data["foreign"])
    for reason in dict.fromkeys(data["uncompiled"].values()):
        count = list(data["uncompiled"].values()).count(reason)
        rows.append(("rounded by torch", f"the inputs of {count} layers: {reason}"))
    rows += [(f"measured by {m.get('by', '-')}", describe_measurement(m)) for m in data["measured"]]
    return property_table(rows)
