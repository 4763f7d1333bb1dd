"""The Python interface in a few names: make a project, run its story, read the verdict.

The work happens in a worker process, as on the command line, so that importing giong never imports torch and a crash of
the one is not the end of the other. (`giong.load` is the exception: it answers in this process; see `giong.voice`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from giong.config import parse
from giong.contracts import RUN_STEPS, Emit, Event
from giong.errors import ConfigError, StoryError
from giong.workspace import Project, atomic_write, resource_errors, safe_name


def init(
    path: str | Path, *, sources: Sequence[str | Path] = (), model: str | None = None, settings: Mapping[str, Any] | None = None
) -> Project:
    """Make a project folder with its giong.yaml. `settings` are sections as in giong.yaml.

    Raises ConfigError when the folder already is a project, and for unknown settings.
    """
    root = Path(path).expanduser().resolve()
    project = Project(root)
    if project.config_path.exists():
        raise ConfigError(
            "This folder already is a project", place=str(project.config_path), remedy="Choose another name, or edit its giong.yaml."
        )
    for source in sources:
        if not Path(source).expanduser().exists():
            raise ConfigError("There is no such folder or file", place=str(source), remedy="Correct --from.")
    values: dict[str, Any] = {"name": safe_name(root.name)}
    if model:
        values["model"] = _absolute_model(model)
    values["data"] = {"paths": [str(Path(source).expanduser().resolve()) for source in sources]}
    for section, content in (settings or {}).items():
        values[section] = (
            {**values.get(section, {}), **content} if isinstance(content, Mapping) and isinstance(values.get(section), dict) else content
        )
    parse(values)
    with resource_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with atomic_write(project.config_path, "w") as stream:
        stream.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return project


def _absolute_model(model: str) -> str:
    # A relative path would mean another folder once the command runs inside the project.
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() or model.startswith((".", "/", "~")) else model


def run(project: Project, steps: Sequence[str] | None = None, *, emit: Emit | None = None, force: bool = False) -> None:
    """Do the story's steps (all that `giong run` does, by default) in a worker. Raises the GiongError that stopped it."""
    from giong.jobs.supervisor import run_story

    run_story(project.root, steps or RUN_STEPS, emit or _quiet, force=force)


def _quiet(event: Event) -> None:
    return None


def verdict(project: Project) -> str:
    """The verdict and its reason in one line. Raises StoryError before there is one."""
    result = project.step_result("eval")
    if result is None:
        raise StoryError("Nothing has been evaluated yet", place=str(project.root), remedy="Call giong.run(project) first.")
    return f"{result['decision']}: {result['reason']}"
