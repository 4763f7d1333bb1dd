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
        from giong.evaluation.report.methods import as_markdown

        typer.echo(as_markdown(result))
    else:
        show_methods(result)


def show_methods(result: Mapping[str, Any]) -> None:
    """The table in the terminal, with what it was measured on."""
    from rich.console import Console
    from rich.table import Table

    from giong.evaluation.report.methods import HEADER, method_rows

    console = Console(width=None if Console().is_terminal else 180, highlight=False)
    table = Table(*HEADER, title=f"{result['num_requests']} test requests of {result['num_documents']} documents", title_justify="left")
    for row in method_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(result["note"], markup=False)
