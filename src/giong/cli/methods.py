"""`giong compare-methods`: what every way of fine-tuning costs and does, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from giong.cli.options import ForceOption, NumProcessesOption, ProjectOption
from giong.workspace import Project


def compare_methods(
    project: ProjectOption = None,
    methods: Annotated[
        str | None, typer.Option(help="Names of methods, separated by commas.", show_default="all that fit the model")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    num_processes: NumProcessesOption = None,
    force: ForceOption = False,
) -> None:
    """Train the same rows, in as many passes, with every method; a table of cost, style, meaning and forgetting."""
    from giong.cli.console import event_display
    from giong.project import compare_methods as compare

    found = Project.find(project or ".")
    names = [name.strip() for name in methods.split(",") if name.strip()] if methods else None
    with event_display() as emit:
        result = compare(found, names, emit=emit, force=force, num_processes=num_processes)
    if markdown:
        typer.echo(as_markdown(result))
    else:
        show_methods(result)


def method_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table: a header, then a row per method."""
    from giong.evaluation.report.table import number, share, share_interval
    from giong.sizing.units import format_bytes

    header = [
        "method", "numbers that move", "file", "tokens/s", "peak memory", "style gap closed", "key recall", "held-out gain, nats/token",
        "forgetting, nats/token", "gates failed",
    ]  # fmt: skip
    return [header] + [
        [
            row["method"], f"{row['num_trainable']:,}", format_bytes(row["saved_bytes"]), f"{row['tokens_per_second']:,.0f}",
            format_bytes(row["peak_memory_bytes"]), share_interval(row["style_gap_closed"]), share((row["key_recall"] or {}).get("point")),
            number((row["gain_nats_per_token"] or {}).get("point"), "+.3f"), number(row["forgetting_nats_per_token"], "+.3f"),
            ", ".join(row["failed_gates"]) or "none",
        ]
        for row in result["rows"]
    ]  # fmt: skip


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table for a page of documentation."""
    header, *rows = method_rows(result)
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_methods(result: Mapping[str, Any]) -> None:
    """The table in the terminal, with what it was measured on."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 180, highlight=False)
    header, *rows = method_rows(result)
    table = Table(*header, title=f"{result['num_requests']} test requests of {result['num_documents']} documents", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(result["note"], markup=False)
