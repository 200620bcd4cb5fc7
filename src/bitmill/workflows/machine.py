"""The machine on which something is measured, and its clock."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from bitmill.version import __version__


def describe_machine(device: str) -> dict[str, Any]:
    """Return processor, memory, system, versions and the name of the GPU; no host name, user or path."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "bitmill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def processor() -> str:
    """Return the model name of the processor where the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def seconds_since(started: float) -> float:
    """Return the seconds since `started`, a value of time.perf_counter(), to the millisecond."""
    return round(time.perf_counter() - started, 3)
