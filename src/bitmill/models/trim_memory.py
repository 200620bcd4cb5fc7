"""Give freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim_malloc() -> None:
    """Return the allocator's free pages, where the C library can (glibc); elsewhere this does nothing.

    glibc keeps freed blocks of up to 32 MB for the next request; in long work they become splinters between
    small objects that live on, and hundreds of MB stay resident that nobody uses.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: None
