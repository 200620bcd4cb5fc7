"""The compiled kernels, where there are any, and how they are chosen.

BITMILL_ISA          avx512, avx2, neon or scalar: the instruction set to use, instead of the best there is
BITMILL_KERNEL       the name of a kernel ("reference", "lut", "triton") to take wherever it supports a layer
BITMILL_ACTIVATIONS  int8 or int16: what the lookup kernels round their inputs to; float32: nothing is rounded
BITMILL_DECODE       off: single tokens go through transformers' own forward, not through the compiled step
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch  # before the extension: both then share torch's OpenMP threads

from bitmill.errors import UsageError

try:
    from bitmill.runtime import _native  # type: ignore[attr-defined]

    why_not = ""
except ImportError as error:
    _native = None
    why_not = str(error)

ACTIVATIONS = ("int8", "int16", "float32")  # csrc/lut/kernel.h: Act
DEFAULT_ACTIVATIONS = "int8"


def native() -> Any:
    """The extension module. Raises UsageError where it is absent or BITMILL_ISA names what this machine lacks."""
    if _native is None:
        raise UsageError(f"bitmill was installed without its compiled kernels ({why_not}); reinstall it.")
    _check_isa()
    return _native


@cache
def _check_isa() -> None:
    try:
        _native.isa()
    except ValueError as error:
        raise UsageError(f"BITMILL_ISA is {os.environ.get('BITMILL_ISA')!r}, but {error}.") from None


def is_available() -> bool:
    """Whether there is an extension; where there is none, that is said once."""
    if _native is None:
        _say_once(f"bitmill runs without its compiled kernels ({why_not}): quantized models will be slow.")
    return _native is not None


def why_none(function: str) -> str | None:
    """None where the extension has this function, or one sentence: there is none, or it is an older one."""
    if not is_available():
        return "The compiled kernels are not installed."
    if hasattr(_native, function):
        return None
    sentence = f"The compiled kernels are older than this bitmill and have no {function}; reinstall it."
    _say_once(sentence)
    return sentence


@cache
def _say_once(sentence: str) -> None:
    logging.getLogger("bitmill").warning(sentence)


def activations() -> str:
    """What inputs are rounded to. Raises UsageError."""
    wanted = os.environ.get("BITMILL_ACTIVATIONS") or DEFAULT_ACTIVATIONS
    if wanted not in ACTIVATIONS:
        raise UsageError(f"BITMILL_ACTIVATIONS is {wanted!r}; use one of: {', '.join(ACTIVATIONS)}.")
    return wanted


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
