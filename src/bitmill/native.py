"""The compiled extension module and the environment variables that choose among kernels.

BITMILL_ISA          avx512, amx, avxvnni, avx2, neon or scalar: the instruction set, instead of the best one here
BITMILL_KERNEL       the name of a kernel ("reference", "lut", "triton") to use wherever it supports a layer
BITMILL_ACTIVATIONS  int8, int16 or float32: the type that inputs are rounded to (`runtime.activations`)
BITMILL_DECODE       off: single tokens use the forward of transformers instead of the compiled decode step
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any

import torch  # before the extension: both then share torch's OpenMP threads

from bitmill.errors import UsageError

try:
    _native: Any = import_module("bitmill._native")
    import_error = ""
except ImportError as error:
    _native = None
    import_error = str(error)


def native() -> Any:
    """Return the extension module.

    Raises:
        UsageError: if it is not installed, or BITMILL_ISA names an instruction set that this machine lacks.
    """
    if _native is None:
        raise UsageError(f"bitmill was installed without its compiled kernels ({import_error}); reinstall it.")
    _check_isa()
    return _native


@cache
def _check_isa() -> None:
    try:
        _native.isa()
    except ValueError as error:
        raise UsageError(f"BITMILL_ISA is {os.environ.get('BITMILL_ISA')!r}, but {error}.") from None


def is_available() -> bool:
    """Return True if the extension is installed; otherwise log one warning."""
    if _native is None:
        _warn_once(f"bitmill runs without its compiled kernels ({import_error}): quantized models will be slow.")
    return _native is not None


def unsupported_reason(function: str) -> str | None:
    """Return None if the extension has `function`, or one sentence: not installed, or an older version."""
    if not is_available():
        return "The compiled kernels are not installed."
    if hasattr(_native, function):
        return None
    sentence = f"The compiled kernels are older than this bitmill and have no {function}; reinstall it."
    _warn_once(sentence)
    return sentence


@cache
def _warn_once(sentence: str) -> None:
    logging.getLogger("bitmill").warning(sentence)


def instruction_set() -> str | None:
    """Return the instruction set of the kernels ("avx512", "avx2", ..., see BITMILL_ISA); None without kernels."""
    return str(native().isa()) if is_available() else None


def threads() -> int:
    """Return the number of threads of a kernel call: as many as torch uses."""
    return torch.get_num_threads()
