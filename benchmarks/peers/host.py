"""What the figures were measured on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bitmill.bench.memory import cache_bytes
from bitmill.comparison.machine import describe_machine

SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def describe_host(threads: int) -> dict[str, Any]:
    """Processor, instruction sets, memory, versions, the day, and how busy the machine was."""
    return {
        **describe_machine("cpu"),
        "threads": threads,
        "instruction_sets": _instruction_sets(),
        "cache_bytes": cache_bytes(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_average": os.getloadavg()[0],
    }


def _instruction_sets() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return [name for name in SETS if name in flags]
