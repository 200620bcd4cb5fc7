"""Availability of Triton on a device, and the largest number of tokens its kernels are used for."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

MIN_VERSION = (3, 6)  # earlier ones are untested
MAX_TOKENS = 64  # for more, decoding the weights once and multiplying with torch is faster


@cache
def install_problem() -> str | None:
    """Return one sentence if Triton is absent or too old, or None."""
    try:
        found = version("triton") if find_spec("triton") else None
    except PackageNotFoundError:
        found = None
    if found is None:
        return "Triton is not installed."
    if tuple(int(part) for part in found.split(".")[:2]) < MIN_VERSION:
        return f"Triton {found} is too old; install {'.'.join(map(str, MIN_VERSION))} or later."
    return None


def is_interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unsupported_reason(device: torch.device) -> str | None:
    """Return None if Triton's kernels run on `device`, or one sentence with the reason."""
    supported = "cpu" if is_interpreted() else "cuda"
    if device.type != supported:
        return f"Triton runs on {supported} here, not on {device.type}."
    return install_problem()


def needs_fp32_tiles(x: Tensor) -> bool:
    """Return True if tiles must be multiplied in fp32: the interpreter mistakes bf16 for integers there."""
    return is_interpreted() and x.dtype == torch.bfloat16
