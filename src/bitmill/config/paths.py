"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path

from bitmill.errors import UsageError, quoted

MAX_NAME_BYTES = 255  # of a file's name, on all common file systems
MAX_PATH_BYTES = 4000


def user_path(path: str | Path) -> Path:
    """Return a path with a leading ~ replaced by the home directory.

    Raises:
        UsageError: no file can have this path.
    """
    spelled = os.path.expanduser(path)
    try:
        names = os.fsencode(spelled)
    except UnicodeEncodeError:
        raise UsageError(f"The path {quoted(spelled)} is no valid text; give another one.") from None
    if b"\0" in names:
        raise UsageError(f"The path {quoted(spelled)} has a NUL character; give another one.")
    longest = max(len(name) for name in names.split(b"/"))
    if longest > MAX_NAME_BYTES or len(names) > MAX_PATH_BYTES:
        raise UsageError(
            f"The path {quoted(spelled)} has a name of {longest:,} and {len(names):,} bytes in all, and file "
            f"systems allow {MAX_NAME_BYTES} and about {MAX_PATH_BYTES:,}; give a shorter one."
        )
    return Path(spelled)
