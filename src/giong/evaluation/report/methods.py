"""The table of `giong compare-methods` as text, for the terminal, the page and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from giong.evaluation.report.table import number, share, share_interval
from giong.sizing.units import format_bytes

HEADER = (
    "method", "numbers that move", "file", "tokens/s", "peak memory", "style gap closed", "key recall", "held-out gain, nats/token",
    "forgetting, nats/token", "gates failed",
)  # fmt: skip


def method_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row per method under `HEADER`; empty where no methods have been compared."""
    return [
        [
            row["method"], f"{row['num_trainable']:,}", format_bytes(row["saved_bytes"]), f"{row['tokens_per_second']:,.0f}",
            format_bytes(row["peak_memory_bytes"]), share_interval(row["style_gap_closed"]), share((row["key_recall"] or {}).get("point")),
            number((row["gain_nats_per_token"] or {}).get("point"), "+.3f"), number(row["forgetting_nats_per_token"], "+.3f"),
            ", ".join(row["failed_gates"]) or "none",
        ]
        for row in result.get("rows") or ()
    ]  # fmt: skip


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table for a page of documentation."""
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 2), "---"], *method_rows(result)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
