"""Sizes and lengths as people write them."""

from __future__ import annotations

import re

from bitmill.errors import UsageError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """Bytes of a size: 80GB and 80g are 80 * 10^9, 80GiB is 80 * 2^30. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise UsageError(f"--memory is {text!r}; write it as 80GB (80 * 10^9 bytes) or 80GiB (80 * 2^30 bytes).")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2]])


def parse_tokens(text: str) -> int:
    """Tokens: 4096, 128k (128 * 2^10) or 1M (2^20). Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower().replace("_", ""))
    tokens = int(float(found[1]) * 1024 ** _POWERS[found[2]]) if found else 0
    if tokens < 1:
        raise UsageError(f"--context is {text!r}; write it as 32768, 128k (128 * 1024) or 1M (1024 * 1024).")
    return tokens
