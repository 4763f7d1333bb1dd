"""Seconds, bytes and dollars as people read them: the only place where giong turns them into text.

Bytes are shown in binary units (GiB), because memory limits and GPU tools count so; None is "unknown", never 0.
"""

from __future__ import annotations

import math

UNKNOWN = "unknown"


def format_seconds(seconds: float | None) -> str:
    """A duration with two units at most: "0.4 s", "42 s", "3 min 05 s", "2 h 07 min", "3 d 4 h"."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    # Round to the smaller unit first, so that 3 599.6 s becomes 1 h 00 min and not 60 min.
    whole_seconds = math.floor(seconds + 0.5)
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60:02d} s"
    whole_minutes = math.floor(seconds / 60 + 0.5)
    if whole_minutes < 24 * 60:
        return f"{whole_minutes // 60} h {whole_minutes % 60:02d} min"
    whole_hours = math.floor(seconds / 3600 + 0.5)
    return f"{whole_hours // 24} d {whole_hours % 24} h"


def format_bytes(num_bytes: float | None) -> str:
    """A size in binary units with three digits at most: "512 B", "39.1 MiB", "140 GiB"."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return UNKNOWN
    if num_bytes < 0:
        return "-" + format_bytes(-num_bytes)
    if num_bytes < 1023.5:
        return f"{num_bytes:.0f} B"
    size, units = num_bytes / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.5 and len(units) > 1:
        size /= 1024
        units.pop(0)
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{decimals}f} {units[0]}"


def format_usd(usd: float | None) -> str:
    """An amount in US dollars: "$0", "less than $0.01", "$4.50", "$1,240"."""
    if usd is None or not math.isfinite(usd):
        return UNKNOWN
    if usd < 0:
        return "-" + format_usd(-usd) if usd <= -0.005 else "$0"
    if usd == 0:
        return "$0"
    if usd < 0.005:
        return "less than $0.01"
    return f"${usd:.2f}" if usd < 999.995 else f"${usd:,.0f}"


def format_cost(usd: float) -> str:
    """What something here costs, for a sentence: "no cost" where nothing is counted."""
    return format_usd(usd) if usd else "no cost"


def format_range(low: str, high: str) -> str:
    """Two formatted amounts as a range; one of them where they read the same."""
    return low if low == high else f"{low} to {high}"
