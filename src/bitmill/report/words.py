"""Plain data in words."""

from __future__ import annotations

from typing import Any


def spelled(format: dict[str, Any]) -> str:
    """A format as `Format.to_dict` gives it: `uniform (bits 3, group_size 64)`, wrappers around what they wrap."""
    inner = format.get("inner")
    options = ", ".join(f"{key} {value}" for key, value in format.items() if key not in ("format", "inner"))
    name = f"{format['format']} ({options})" if options else str(format["format"])
    return f"{name} around {spelled(inner)}" if isinstance(inner, dict) else name
