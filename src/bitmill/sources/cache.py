"""The folder of the user in which downloads and conversions are kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitmill.errors import SourceError, one_line
from bitmill.sources.base import digest_of, files_of

_State = list[tuple[str, int, int]]  # name, size and mtime of every file
_verified: dict[Path, _State] = {}  # what this process has hashed


def cache_folder() -> Path:
    """Return BITMILL_CACHE, else XDG_CACHE_HOME/bitmill, else ~/.cache/bitmill."""
    if own := os.environ.get("BITMILL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "bitmill"


def is_intact(path: Path, sha256: str) -> bool:
    """Return True if a cached file or folder is complete; hashed once per process, and again after a change.

    Args:
        path: the file or folder.
        sha256: of it, see `digest_of`.
    """
    try:
        state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files_of(path)]
        if _verified.get(path) == state:
            return True
        intact = digest_of(path) == sha256
    except OSError:
        return False  # fetched again, and replaced
    if intact:
        _verified[path] = state
    return intact


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Raise SourceError where the cache cannot be written, instead of OSError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SourceError(
                f"The disk is full at {folder}; free some space or point BITMILL_CACHE elsewhere."
            ) from error
        raise SourceError(
            f"The cache {folder} cannot be written ({error.strerror or one_line(error)}); "
            "point BITMILL_CACHE at a folder you own."
        ) from error
