"""`giong adapters merge`: several tuned models of a project added into one."""

from __future__ import annotations

from typing import Annotated

import typer

from giong.cli.options import ProjectOption
from giong.workspace import Project

app = typer.Typer(help="Add adapters of one base.", no_args_is_help=True)


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="Models of the project, as `giong ls` names them.")],
    name: Annotated[str, typer.Option(help="Name of the new model.")],
    weights: Annotated[str, typer.Option(help="What each update is multiplied by: 0.7,0.3.", show_default="one over their number")] = "",
    combination: Annotated[str, typer.Option(help="cat: exact, with the sum of the ranks; svd: the largest directions alone.")] = "cat",
    rank: Annotated[int | None, typer.Option(help="With svd: the rank of the result.", show_default="the highest rank added")] = None,
    project: ProjectOption = None,
) -> None:
    """Add the updates of models that were trained with `lora`, each with a weight, into a new model."""
    from giong.cli.console import event_display
    from giong.errors import ConfigError
    from giong.jobs.supervisor import run_story

    try:
        numbers = [float(weight) for weight in weights.split(",") if weight.strip()]
    except ValueError:
        raise ConfigError(f"{weights!r} is no list of numbers", place="--weights", remedy="Write --weights 0.7,0.3.") from None
    settings = {"merge": models, "weights": numbers, "name": name, "combination": combination, "rank": rank}
    with event_display() as emit:
        run_story(
            Project.find(project or ".").root,
            ["merge-adapters"],
            emit,
            settings={f"adapters.{key}": value for key, value in settings.items()},
        )
