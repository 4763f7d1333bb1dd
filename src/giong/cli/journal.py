"""`giong journal`: what this project is for, what was tried and learnt, what comes next; and a person's own sentences in it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from giong.cli.options import ProjectOption
from giong.workspace import Project

app = typer.Typer(help="Goal, plan, what was tried, what was learnt, what comes next.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def journal(
    context: typer.Context, project: ProjectOption = None, as_json: Annotated[bool, typer.Option("--json", help="For tools.")] = False
) -> None:
    """Print the journal that the steps keep: goal, plan, what was tried, what was learnt, what comes next."""
    if context.invoked_subcommand:
        # Said before the subcommand, it is meant for it.
        context.obj = project
        return
    from giong.journal import Journal

    kept = Journal(Project.find(project or "."))
    text = kept.markdown()
    typer.echo(json.dumps(kept.to_dict(), ensure_ascii=False, indent=1) if as_json else text.rstrip("\n"))


@app.command()
def add(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="What to remember.")],
    kind: Annotated[str, typer.Option("--to", help="Part of the journal: goal, plan, tried, learnt, next or note.")] = "note",
    project: ProjectOption = None,
) -> None:
    """Add a sentence of your own."""
    from giong.journal import Journal

    kept = Journal(Project.find(project or context.obj or "."))
    kept.add(text, kind)
    typer.echo(f"written to {kept.path}", err=True)
