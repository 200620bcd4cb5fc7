"""bitmill inspect and bitmill verify."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, Device, TrustRemoteCode
from bitmill.cli.output import facts, kv_facts, measured_row, megabytes, working

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder that bitmill quantize wrote.", show_default=False)
]


def inspect(folder: FolderArgument, as_json: AsJson = False) -> None:
    """List what a quantized folder holds, in which formats and how many bits."""
    with working(as_json) as output:
        from bitmill.checkpoint.files import folder_bytes
        from bitmill.checkpoint.reader import open_checkpoint

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
            "folder_bytes": folder_bytes(folder),
            "recipe": report.get("recipe"),
            "kv": report.get("kv"),
            "measured": report.get("measured", []),
            "tensors": tensors,
        }
        output.result(data, lambda: [_table(tensors), "", _totals(data)])


def verify(
    folder: FolderArgument,
    quality: Annotated[
        bool, typer.Option("--quality/--no-quality", help="Measure what was recorded again.")
    ] = True,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte and every tensor of a quantized folder, and that it still performs as recorded."""
    with working(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.reader import open_checkpoint
        from bitmill.checkpoint.verify import verify, verify_quality
        from bitmill.report.metrics import REFERENCE_FREE

        def again(recorded: dict[str, Any]) -> dict[str, Any]:
            return api.evaluate(
                folder,
                text_source=recorded["text"],
                split=recorded["split"],
                seqlen=recorded["seqlen"],
                windows=recorded["windows"],
                device=device,
                progress=output.progress,
                trust_remote_code=trust_remote_code,
            )

        checkpoint = open_checkpoint(folder)
        counts = verify(checkpoint, output.progress, trust_remote_code=trust_remote_code)
        found = verify_quality(checkpoint, again) if quality else None
        checked = f"{counts['files']} files, {counts['tensors']} tensors, {counts['layers']} quantized layers"
        rows = [("sound", checked)]
        if quality:
            said = "nothing was recorded" if found is None else f"as recorded (changed by {found[1]:.2g})"
            rows.append((found[0].replace("_", " ") if found else "perplexity", said))
        changes = {f"{key}_change": found[1] if found and found[0] == key else None for key in REFERENCE_FREE}
        data = {"folder": str(folder), "sound": True, **counts, **changes}
        output.result(data, lambda: [facts(rows)])


def _table(tensors: list[dict[str, Any]]) -> Any:
    """One row for all tensors that differ in nothing but the number of their block."""
    from rich.table import Table

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for tensor in tensors:
        name = re.sub(r"\.\d+\.", ".*.", tensor["name"])
        shape = " x ".join(str(side) for side in tensor["shape"])
        groups.setdefault((name, tensor["format"], shape), []).append(tensor)
    table = Table(box=None, pad_edge=False)
    for title, justify in (("tensor", "left"), ("format", "left"), ("shape", "right"), ("count", "right")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("bits/weight", justify="right")
    table.add_column("size", justify="right")
    for (name, format, shape), members in groups.items():
        size = sum(member["size_bytes"] for member in members)
        bits = members[0]["bits_per_weight"]
        table.add_row(name, format, shape, str(len(members)), f"{bits:.3f}", megabytes(size))
    return table


def _totals(data: dict[str, Any]) -> Any:
    recipe = data["recipe"] or {}
    in_blocks = " in the quantized layers of the blocks" if recipe else ""
    rows = [
        ("source", str(data["source"])),
        ("recipe", str(recipe.get("name", "-"))),
        ("bits per weight", f"{data['bits_per_weight']:.3f}{in_blocks}"),
        *(("", f"{bits:.3f} in embedding and head") for bits in [data["head_bits_per_weight"]] if bits),
        ("size", f"{megabytes(data['size_bytes'])} of tensors, {megabytes(data['folder_bytes'])} in all"),
    ]
    if data["kv"]:
        rows.append(("keys and values", kv_facts(data["kv"])))
    rows += [(f"measured by {measured.get('by', '-')}", measured_row(measured)) for measured in data["measured"]]
    return facts(rows)
