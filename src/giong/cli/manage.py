"""`giong ls` and `giong delete`: the runs and models of a project."""

from __future__ import annotations

from typing import Annotated

import typer

from giong.cli.options import ProjectOption
from giong.errors import ConfigError
from giong.workspace import Project, read_json, remove_folder, safe_name


def ls(project: ProjectOption = None) -> None:
    """List the models and runs of the project, one per line."""
    found = Project.find(project or ".")
    for path in found.list_models():
        record = read_json(path / "model.json")
        typer.echo(f"model\t{path.name}\t{record['format']} over {record['base']}\trun {record['run']}")
    for path in found.list_runs():
        record = read_json(path / "run.json")
        state = "finished" if (path / "results.json").is_file() else "unfinished"
        typer.echo(f"run\t{path.name}\t{record['num_rows']} rows\t{state}")


def delete(
    name: Annotated[str, typer.Argument(help="A model or a run, as `giong ls` names it.")],
    project: ProjectOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model or a run. The data and the answers of the arms stay."""
    found = Project.find(project or ".")
    safe_name(name)
    paths = [path for path in (*found.list_models(), *found.list_runs()) if path.name == name]
    if not paths:
        known = ", ".join(path.name for path in (*found.list_models(), *found.list_runs())) or "none"
        raise ConfigError(f"There is no model or run named {name!r}", place=str(found.root), remedy=f"There are: {known}.")
    kinds = " and ".join("model" if path.parent.name == "models" else "run" for path in paths)
    if not yes and not typer.confirm(f"Delete {kinds} {name}?", err=True):
        raise typer.Exit(1)
    for path in paths:
        remove_folder(path)
        typer.echo(f"deleted {path}", err=True)
