"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path

from bitmill.errors import UsageError, quoted

MAX_NAME_BYTES = 255  # of a file's name, on all common file systems
MAX_PATH_BYTES = 4000


def user_path(path: str | os.PathLike[str], room_bytes: int = 0) -> Path:
    """Return a path with a leading ~ replaced by the home directory.

    Args:
        path: the path.
        room_bytes: of a suffix that names made from this one get.

    Raises:
        UsageError: no file can have this path.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise UsageError(f"A path is {quoted(path)}; give text.")
    spelled = os.path.expanduser(path)
    try:
        names = os.fsencode(spelled)
    except UnicodeEncodeError:
        raise UsageError(f"The path {quoted(spelled)} is no valid text; give another one.") from None
    if b"\0" in names:
        raise UsageError(f"The path {quoted(spelled)} has a NUL character; give another one.")
    longest = max(len(name) for name in names.split(b"/"))
    if longest > MAX_NAME_BYTES - room_bytes or len(names) > MAX_PATH_BYTES:
        raise UsageError(
            f"The path {quoted(spelled)} has a name of {longest:,} and {len(names):,} bytes in all, and file "
            f"systems allow {MAX_NAME_BYTES - room_bytes} and about {MAX_PATH_BYTES:,}; give a shorter one."
        )
    return Path(spelled)
