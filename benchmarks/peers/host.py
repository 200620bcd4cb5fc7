"""Description of the machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

from bitmill.workflows.bench.memory import cache_bytes
from bitmill.workflows.machine import describe_machine

SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512vbmi",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)


def describe_host(threads: int) -> dict[str, Any]:
    """Processor, instruction sets, memory, versions, the day, and how busy the machine was."""
    return {
        **describe_machine("cpu"),
        "threads": threads,
        "instruction_sets": _instruction_sets(),
        "cache_bytes": cache_bytes(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "busy": busy(),
    }


def busy() -> float:
    """The share of the processors that others use, seen while nothing of this benchmark runs."""
    return psutil.cpu_percent(interval=1) / 100


def _instruction_sets() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return [name for name in SETS if name in flags]
