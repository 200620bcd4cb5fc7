"""Numbers, sizes, durations and shares as the pages and tables print them."""

from __future__ import annotations

DASH = "–"
GAP, NARROW = "\u00a0", "\u202f"  # spaces at which no line breaks
_DIGITS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float | None, digits: int = 4) -> str:
    """Format a number with trailing zeros; magnitudes below 1e-4 and from 1e5 on as powers of ten.

    Args:
        value: the number; None is a dash.
        digits: significant digits.
    """
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.{max(digits - 3, 0)}e}".partition("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_DIGITS)}"
    shown = f"{value:.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:#.{digits}g}".rstrip(".")
    return f"{float(shown):,.0f}".replace(",", NARROW) if abs(value) >= 9999.5 else shown


def size(size_bytes: float | None) -> str:
    """Format bytes as kB, MB or GB (powers of ten) with three digits."""
    if size_bytes is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            scaled = size_bytes / factor
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f}{GAP}{unit}"
    return f"{size_bytes:.0f}{GAP}B"


def duration(time_s: float | None) -> str:
    """Format seconds as s, min and s, or h and min."""
    if time_s is None:
        return DASH
    if time_s < 9.95:
        return f"{time_s:.1f}{GAP}s"
    whole = round(time_s)
    if whole < 120:
        return f"{whole}{GAP}s"
    if whole < 7200:
        return GAP.join((f"{whole // 60}", "min", f"{whole % 60:02d}", "s"))
    return GAP.join((f"{whole // 3600}", "h", f"{whole % 3600 // 60:02d}", "min"))


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share (0 to 1) as a percentage with `digits` decimals."""
    return DASH if share is None else f"{100 * share:.{digits}f}{GAP}%"


def change(value: float | None, reference: float | None) -> str:
    """Format a relative change.

    Args:
        value: the new value.
        reference: the old value.

    Returns:
        A signed percentage up to +100 %, a factor above; a dash where a value is missing.
    """
    if value is None or not reference:
        return DASH
    ratio = value / reference
    if ratio >= 2:
        return f"×{number(ratio, 3)}"
    shown = f"{100 * (ratio - 1):+.1f}"
    return ("±0.0" if shown in ("+0.0", "-0.0") else shown.replace("-", "−")) + f"{GAP}%"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun, with a plural s unless the count is 1."""
    return f"{count}{GAP}{noun}{'' if count == 1 else 's'}"
