"""The text that calibrates where none is named."""

from __future__ import annotations

import os

VARIABLE = "BITMILL_CALIB"  # environment variable with the name of another text
MIX = "mix"


def default_calibration() -> str:
    """Return the text of BITMILL_CALIB, else `mix`, the mixture of all domains."""
    return os.environ.get(VARIABLE) or MIX
