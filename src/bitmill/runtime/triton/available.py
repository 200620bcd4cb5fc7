"""Whether Triton's kernels can run on a device, and for how many tokens."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = (3, 6)  # earlier ones were not tried
MAX_TOKENS = 64  # more are worth decoding the weights for


@cache
def missing() -> str | None:
    """One sentence where Triton is absent or too old."""
    try:
        found = version("triton") if find_spec("triton") else None
    except PackageNotFoundError:
        found = None
    if found is None:
        return "Triton is not installed."
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"Triton {found} is too old; install {'.'.join(map(str, OLDEST))} or later."
    return None


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unsupported_reason(device: torch.device) -> str | None:
    """None where Triton's kernels run on `device`, or one sentence that says why not."""
    wanted = "cpu" if is_interpreted() else "cuda"
    if device.type != wanted:
        return f"Triton runs on {wanted} here, not on {device.type}."
    return missing()


def widens(x: Tensor) -> bool:
    """Whether tiles must be multiplied in fp32: the interpreter takes bf16 for integers there."""
    return is_interpreted() and x.dtype == torch.bfloat16
