"""The tables of `giong compare-methods` as text, for the terminal, the page and Markdown alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from giong.evaluation.report.table import number, share, share_interval
from giong.sizing.units import format_bytes


def _cells(row: Mapping[str, Any], kind: str, *, with_pairs: bool) -> Iterator[tuple[str, str]]:
    """(column, cell) of a line. Objectives read as many tokens as each other, which their number shows."""
    yield kind, row[kind]
    if kind == "objective":
        yield "tokens", f"{row['num_tokens']:,}"
    yield "numbers that move", f"{row['num_trainable']:,}"
    yield "file", format_bytes(row["saved_bytes"])
    yield "tokens/s", f"{row['tokens_per_second']:,.0f}"
    yield "peak memory", format_bytes(row["peak_memory_bytes"])
    yield "style gap closed", share_interval(row["style_gap_closed"])
    yield "key recall", share((row["key_recall"] or {}).get("point"))
    yield "held-out gain, nats/token", number((row["gain_nats_per_token"] or {}).get("point"), "+.3f")
    yield "forgetting, nats/token", number(row["forgetting_nats_per_token"], "+.3f")
    if with_pairs:
        yield "preference accuracy", share_interval(row["preference_accuracy"])
    yield "gates failed", ", ".join(row["failed_gates"]) or "none"


def _table(result: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    kind, rows = result.get("compared", "method"), result.get("rows") or ()
    with_pairs = any(row.get("preference_accuracy") for row in rows)
    return [list(_cells(row, kind, with_pairs=with_pairs)) for row in rows]


def header(result: Mapping[str, Any]) -> list[str]:
    """The columns of the table; none where nothing has been compared."""
    return [column for column, _ in next(iter(_table(result)), ())]


def method_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row per method or objective under `header`; empty where none have been compared."""
    return [[cell for _, cell in row] for row in _table(result)]


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table for a page of documentation."""
    columns = header(result)
    lines = [columns, ["---", *["---:"] * (len(columns) - 2), "---"], *method_rows(result)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
