"""`giong init`: make a project folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    name: Annotated[str, typer.Argument(help="Folder to make; its last part is the name of the voice.")],
    source: Annotated[list[Path], typer.Option("--from", help="Folder or file with the author's writing; may be given several times.")],
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder, a hub name, or giong-tiny (bundled).", show_default="giong-tiny")
    ] = None,
    author: Annotated[str, typer.Option(help="Whose writing this is.")] = "",
    consent: Annotated[bool, typer.Option("--consent", help="The author has agreed to be imitated.")] = False,
) -> None:
    """Make a project from a folder of writing."""
    from giong.project import init as make

    settings = {"data": {"consent": {"author": author, "granted": consent}}} if author or consent else {}
    project = make(name, sources=source, model=model, settings=settings)
    typer.echo(project.config_path)
    if not consent:
        typer.echo("No consent is recorded. If the author agreed to be imitated, set data.consent in giong.yaml.", err=True)
    typer.echo(f"Next: giong run --project {name}", err=True)
