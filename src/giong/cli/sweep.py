"""`giong sweep`: search over settings; the trials as a table, the winner, and how much of its lead is luck."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from giong.cli.options import ForceOption, NumProcessesOption, ProjectOption
from giong.workspace import Project


def sweep(
    project: ProjectOption = None,
    trials: Annotated[int | None, typer.Option(help="Trials of each search.", show_default="sweep.num_trials, or 12")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=SPACE", show_default=False,
            help="A setting to search over, instead of those in giong.yaml: train.learning_rate=1e-5..1e-3:log, method.lora_r=8,16,32; "
            "may be given several times.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of settings.", show_default=False)] = None,
    pruning: Annotated[
        bool | None, typer.Option("--pruning/--no-pruning", help="Stop trials that fall behind.", show_default="pruning")
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Begin no trial after so much time.", show_default=False)] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Requests answered per trial of sampling settings.", show_default="sweep.max_requests, or 24")
    ] = None,
    num_processes: NumProcessesOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Write the winner into giong.yaml; its comments stay.")] = False,
    force: ForceOption = False,
) -> None:  # fmt: skip
    """Search over training and sampling settings on the validation documents. The frozen test side is never looked at."""
    from giong.cli.console import event_display
    from giong.config.sweep import parameters_from_text
    from giong.project import sweep as search
    from giong.project import write_settings

    found = Project.find(project or ".")
    parameters = parameters_from_text(assignments) if assignments else None
    with event_display() as emit:
        result = search(
            found, parameters, num_trials=trials, seed=seed, pruning=pruning, max_seconds=max_seconds, max_requests=max_requests,
            emit=emit, force=force, num_processes=num_processes,
        )  # fmt: skip
    # Shown first: what cannot be written can then be copied.
    show_sweep(result)
    if apply:
        write_settings(found, result["settings"])
        typer.echo(f"written to {found.config_path}", err=True)
    else:
        typer.echo("Put these lines into giong.yaml, or run the same command with --apply. Next: giong train", err=True)


def show_sweep(result: dict[str, Any]) -> None:
    """The trials of each search, its winner with interval and warning, and the lines for giong.yaml."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    for part in ("training", "sampling"):
        if result[part]:
            _show_search(result[part], part, console)
    console.print(f"\n{result['yaml'].rstrip()}", markup=False, soft_wrap=True)


def _show_search(search: dict[str, Any], part: str, console: Any) -> None:
    from rich.table import Table

    from giong.sizing.units import format_seconds

    best, unit = search["best"], search["unit"]
    measured_on = f"{search['num_requests']} validation requests of {search['num_documents']} documents"
    table = Table("trial", *search["parameters"], unit, "state", "time", "run", title=f"{part}: {measured_on}", title_justify="left")
    for trial in search["trials"]:
        number = f"{trial['number']}{' *' if trial['number'] == best['winner'] else ''}{' (as it was)' if trial['number'] == 0 else ''}"
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        values = [_shown(trial["settings"][name]) for name in search["parameters"]]
        table.add_row(number, *values, value, _state(trial), format_seconds(trial["seconds"]), trial["run"])
    console.print(table)
    value = best["value"]
    console.print(
        f"* trial {best['winner']}: {value['point']:.4f} {unit} ({value['level'] * 100:.0f} % interval {value['low']:.4f} to {value['high']:.4f})"
    )
    console.print(search["note"], markup=False)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _state(trial: dict[str, Any]) -> str:
    if trial["state"] == "pruned":
        return f"stopped at {trial['last_percent']} %"
    return trial["state"]
