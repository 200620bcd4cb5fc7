"""Plain data in words."""

from __future__ import annotations

from typing import Any


def kv_said(kv: dict[str, Any]) -> str:
    """How keys and values are kept, as a report has it, in a sentence."""
    options = ", ".join(f"{key} {plain_word(value)}" for key, value in kv["method"].items() if key != "kv method")
    calibration, found = kv.get("calibration"), ""
    if calibration:
        windows = f"{calibration['samples']} windows of {calibration['seqlen']} tokens"
        found = f", calibrated on {windows} of {calibration['source']} ({kv['size_bytes']:,} bytes)"
    return (
        f"Keys and values are packed by {kv['method']['kv method']} ({options}) when text is generated: "
        f"{kv['bits_per_element']:.3f} bits per number in full pages{found}."
    )


def kv_measured(measured: dict[str, Any]) -> str:
    """Which packed cache a measurement went through; empty where it was an ordinary one."""
    if measured.get("kv_method") is None:
        return ""
    return f" through {measured['kv_method']}, {measured['kv_bits_per_element']:.3f} bits per number of the cache"


def plain_word(value: Any) -> str:
    """A value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def spelled(format: dict[str, Any]) -> str:
    """A format as `Format.to_dict` gives it: `uniform (bits 3, group_size 64)`, wrappers around what they wrap."""
    inner = format.get("inner")
    options = ", ".join(f"{key} {value}" for key, value in format.items() if key not in ("format", "inner"))
    name = f"{format['format']} ({options})" if options else str(format["format"])
    return f"{name} around {spelled(inner)}" if isinstance(inner, dict) else name
