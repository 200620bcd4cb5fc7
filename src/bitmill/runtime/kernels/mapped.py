"""Pages of mapped files that are not needed any more.

The tensors of a folder are its mapped files: what was read of them counts as memory of the process until they are
dropped. A matrix of hundreds of MB, such as the table of embeddings, would be held twice while it is repacked.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


def is_mapped_file(tensor: Tensor) -> bool:
    """Return True for a tensor in a mapped file of which no page was changed; False where Linux does not tell."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    inside = False
    for line in lines:
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # "7f01-7f02 r--p 00000000 fd:00 1234  /path"
            low, high = (int(number, 16) for number in first.split("-"))
            inside = low <= start and stop <= high and "/" in rest
        elif inside and first == "Anonymous:":  # changed pages, which are the process's own
            return rest.split()[0] == "0"
    return False


def release_pages(tensor: Tensor) -> None:
    """Give back the whole pages of a contiguous tensor in a mapped file; the next access reads them again.

    Args:
        tensor: One for which `is_mapped_file` is True: pages of any other memory would be lost.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _DONTNEED is not None and stop > start:
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)


@functools.cache
def _madvise() -> Callable[..., object]:
    function: Callable[..., object] = ctypes.CDLL(None).madvise
    return function
