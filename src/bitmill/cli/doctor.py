"""bitmill doctor."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from bitmill.cli.options import AsJson
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.errors import BitmillError
from bitmill.report.text import format_mb


def doctor(as_json: AsJson = False) -> None:
    """Check the installation: versions, processor, kernels, cache, and optional packages that are missing."""
    with command_output(as_json) as output:
        output.progress.start("looking around", 0)
        from bitmill.workflows.doctor import diagnose

        found = diagnose()
        output.result(found, lambda: _render(found))
        if problems := found["problems"]:
            more = f" (and {len(problems) - 1} more problems above)" if len(problems) > 1 else ""
            raise BitmillError(f"{problems[0]}{more}")


def _render(found: dict[str, Any]) -> list[Any]:
    packages = [
        (one["name"], one["version"] or "missing", one["purpose"], "" if one["version"] else one["install"])
        for one in found["packages"]
    ]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    rows = [("versions", versions), *_machine_rows(found["machine"]), *_kernel_rows(found["kernels"])]
    cache = found["cache"]
    rows.append(
        ("cache", f"{cache['folder']}: {format_mb(cache['size_bytes'])}, {format_mb(cache['free_bytes'])} free")
    )
    problems = [("problem", sentence) for sentence in found["problems"]] or [("problems", "none")]
    return [
        property_table(rows),
        "",
        "Optional packages",
        data_table(
            ("package", "version", "for", "install"), packages, left=("package", "version", "for", "install")
        ),
        "",
        property_table(problems),
    ]


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    sets = ", ".join(machine["instruction_sets"]) or "unknown"
    if "cpu" not in machine:
        return [("instruction sets", sets)]
    memory = f"{machine['memory_bytes'] / 1e9:.1f} GB, {machine['available_bytes'] / 1e9:.1f} GB of it available"
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 1e9:.1f} GB)" for gpu in machine["gpus"])
    return [
        ("system", machine["system"]),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("instruction sets", sets),
        ("memory", memory),
        ("GPUs", gpus or "none"),
    ]


def _kernel_rows(kernels: dict[str, Any]) -> list[tuple[str, str]]:
    if not kernels:
        return []
    rows = [
        ("compiled kernels", f"{kernels['compiled'] or 'missing'}, {kernels['activations']} activations"),
        ("Triton", kernels["triton"] or "missing"),
    ]
    for device, of_methods in kernels["of_methods"].items():
        by_kernel = defaultdict(list)
        for method, kernel in of_methods.items():
            by_kernel[kernel].append(method)
        rows += [(f"{kernel} on {device}", ", ".join(methods)) for kernel, methods in sorted(by_kernel.items())]
    return rows
