"""`giong compare-methods`: what every way of fine-tuning, and every objective, costs and does on the same base."""

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
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Names of objectives, separated by commas, or `all` that fit the data.",
            show_default="all where data.preferences is set and no --methods are named",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    num_processes: NumProcessesOption = None,
    force: ForceOption = False,
) -> None:
    """Train the same rows with every method, and as many tokens with every objective; tables of cost, style, meaning and forgetting."""
    from giong import project as giong
    from giong.cli.console import event_display
    from giong.config import load

    found, results = Project.find(project or "."), []
    with event_display() as emit:
        how = {"emit": emit, "force": force, "num_processes": num_processes}
        if methods or not objectives:
            results.append(giong.compare_methods(found, _names(methods), **how))
        if objectives or (not methods and load(found.config_path).data.preferences):
            results.append(giong.compare_objectives(found, _names(objectives), **how))
    for result in results:
        if markdown:
            from giong.evaluation.report.methods import as_markdown

            typer.echo(as_markdown(result))
        else:
            show_methods(result)


def _names(given: str | None) -> list[str] | None:
    """None stands for all."""
    return None if given in (None, "all") else [name.strip() for name in given.split(",") if name.strip()]


def show_methods(result: Mapping[str, Any]) -> None:
    """A table in the terminal, with what it was measured on."""
    from rich.console import Console
    from rich.table import Table

    from giong.evaluation.report.methods import header, method_rows

    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    pairs = f", {result['num_pairs']} held-out pairs" if result.get("num_pairs") else ""
    title = f"{result['num_requests']} test requests of {result['num_documents']} documents{pairs}"
    table = Table(*header(result), title=title, title_justify="left")
    for row in method_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(result["note"], markup=False)
