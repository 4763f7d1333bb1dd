"""The verbs that walk the story: `run`, and one verb per step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from giong.cli.options import ForceOption, NumProcessesOption, ProjectOption
from giong.contracts import TASK_STEPS
from giong.workspace import Project


def perform(project: Path | None, steps: Sequence[str], *, force: bool = False, num_processes: int | None = None) -> Project:
    """Run steps (by default those of the project's task) in a worker, showing its events; returns the project."""
    from giong.cli.console import event_display
    from giong.config import load
    from giong.jobs.supervisor import run_story

    found = Project.find(project or ".")
    steps = steps or TASK_STEPS[load(found.config_path).task]
    with event_display() as emit:
        run_story(found.root, steps, emit, force=force, num_processes=num_processes)
    return found


def run(
    project: ProjectOption = None,
    steps: Annotated[str, typer.Option(help="Steps to walk, in order; by default all of the project's task.")] = "",
    num_processes: NumProcessesOption = None,
    force: ForceOption = False,
) -> None:
    """Walk the whole story: import, synth, baseline, size, train, eval, report (other tasks: their own). Only what changed is done again."""
    found = perform(project, [step.strip() for step in steps.split(",") if step.strip()], force=force, num_processes=num_processes)
    if found.step_result("eval"):
        from giong.cli.results import show_results

        show_results(found)


def import_(project: ProjectOption = None, force: ForceOption = False) -> None:
    """Read, clean, cut and split the writing; freeze the test side."""
    perform(project, ["import"], force=force)


def synth(project: ProjectOption = None, force: ForceOption = False) -> None:
    """Reverse synthesis: write the requests that would have led to the author's texts."""
    perform(project, ["synth"], force=force)


def baseline(project: ProjectOption = None, force: ForceOption = False) -> None:
    """Let every way of prompting answer the test requests."""
    perform(project, ["baseline"], force=force)


def size(project: ProjectOption = None, num_processes: NumProcessesOption = None, force: ForceOption = False) -> None:
    """Pilots, learning curve, forecast, and what training costs here and elsewhere."""
    found = perform(project, ["size"], force=force, num_processes=num_processes)
    from giong.cli.results import show_sizing

    show_sizing(found)


def train(project: ProjectOption = None, num_processes: NumProcessesOption = None, force: ForceOption = False) -> None:
    """Train on all rows and save the model with its sampling settings."""
    perform(project, ["train"], force=force, num_processes=num_processes)


def eval_(project: ProjectOption = None, force: ForceOption = False) -> None:
    """Measure every arm on the frozen test side, check the gates, give the verdict."""
    found = perform(project, ["eval"], force=force)
    from giong.cli.results import show_results

    show_results(found)


def report(project: ProjectOption = None, force: ForceOption = False) -> None:
    """Write the report page; its path goes to standard output."""
    found = perform(project, ["report"], force=force)
    typer.echo(found.report_path)


def export(project: ProjectOption = None, force: ForceOption = False) -> None:
    """Write the adapter and the merged model, with proof that they are the evaluated model."""
    found = perform(project, ["export"], force=force)
    for step in sorted((found.root / "steps").glob("export-*.json")):
        result = found.step_result(step.stem)
        if result:
            typer.echo(result["path"])
