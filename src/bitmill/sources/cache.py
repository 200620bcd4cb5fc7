"""The folder of the user in which downloads and conversions are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return BITMILL_CACHE, else XDG_CACHE_HOME/bitmill, else ~/.cache/bitmill."""
    if own := os.environ.get("BITMILL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "bitmill"
