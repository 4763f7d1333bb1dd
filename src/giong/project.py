"""The Python interface in a few names: make a project, run its story, read the verdict.

The work happens in a worker process, as on the command line, so that importing giong never imports torch and a crash of
the one is not the end of the other. (`giong.load` is the exception: it answers in this process; see `giong.voice`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from giong.config import MethodConfig, load, parse, with_settings
from giong.config.editing import with_written
from giong.contracts import TASK_STEPS, Emit, Event
from giong.errors import ConfigError, ModelError, StoryError
from giong.workspace import Project, atomic_write, resource_errors, safe_name

if TYPE_CHECKING:
    from giong.evaluation.compare import Comparison
    from giong.evaluation.compare.pairs import Mode


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


def run(
    project: Project, steps: Sequence[str] | None = None, *, emit: Emit | None = None, force: bool = False, num_processes: int | None = None
) -> None:
    """Do the story's steps (all that `giong run` does, by default) in a worker. Raises the GiongError that stopped it.

    `num_processes` share each training step; None stands for `train.num_processes`.
    """
    from giong.jobs.supervisor import run_story

    run_story(project.root, steps or TASK_STEPS[load(project.config_path).task], emit or _quiet, force=force, num_processes=num_processes)


def sweep(
    project: Project,
    parameters: Mapping[str, Any] | None = None,
    *,
    num_trials: int | None = None,
    seed: int | None = None,
    pruning: bool | None = None,
    max_seconds: float | None = None,
    apply: bool = False,
    emit: Emit | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Search over settings on the validation documents; what is None is as in giong.yaml. `apply` writes the winner there.

    `parameters` as in section `sweep`: `{"train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "method.lora_r": [8, 16]}`.
    Returns the result: `settings` of the winner by dotted name, `training` and `sampling` with their trials, value, interval and
    how optimistic it is. Raises ConfigError for a setting or value that cannot be swept, and where Optuna is not installed.
    """
    from giong.jobs.supervisor import run_story

    given = {"parameters": parameters, "num_trials": num_trials, "seed": seed, "pruning": pruning, "max_seconds": max_seconds}
    config = load(project.config_path)
    section = {**config.sweep.model_dump(), **{name: value for name, value in given.items() if value is not None}}
    # Checked here, where a mistake costs no start of a worker.
    checked = with_settings(config, {"sweep": section}).sweep.model_dump()
    run_story(project.root, ["sweep"], emit or _quiet, force=force, settings={"sweep": checked})
    result = project.step_result("sweep")
    assert result is not None
    if apply:
        write_settings(project, result["settings"])
    return result


def compare_methods(
    project: Project,
    methods: Sequence[str] | None = None,
    *,
    emit: Emit | None = None,
    force: bool = False,
    num_processes: int | None = None,
) -> dict[str, Any]:
    """The same rows and passes through several methods; returns a row per method, what it costs and what it does.

    `methods` are names of `method.name`, None for all; one that this model cannot be tuned with is said and passed over. Each gets
    its own default learning rate, but for the method of giong.yaml, which keeps its settings. Raises ConfigError for an unknown name.
    """
    from giong.jobs.supervisor import run_story

    config, emit = load(project.config_path), emit or _quiet
    names = method_names()
    if unknown := [name for name in methods or () if name not in names]:
        raise ConfigError(f"There is no method {unknown[0]!r}", remedy=f"Methods: {', '.join(names)}.")
    run_story(project.root, ["baseline"], emit, force=force)
    for name in methods or names:
        own = {} if name == config.method.name else {"train.learning_rate": None, "method.name": name}
        try:
            run_story(project.root, ["method-trial"], emit, force=force, settings=own, num_processes=num_processes)
        except (ConfigError, ModelError) as error:
            if methods:
                raise
            emit(Event("notice", "compare-methods", f"{name} is left out: {error}"))
    run_story(project.root, ["compare-methods"], emit, force=force)
    result = project.step_result("compare-methods")
    assert result is not None
    return result


def method_names() -> tuple[str, ...]:
    """Every value of `method.name`."""
    return get_args(MethodConfig.model_fields["name"].annotation)


def write_settings(project: Project, settings: Mapping[str, Any]) -> None:
    """Put settings (by dotted name) into the project's giong.yaml; its comments and everything else stay. Raises ConfigError."""
    project.edit_config(lambda text: with_written(text, settings, place=str(project.config_path)))


def compare(
    project: Project, arms: Sequence[str] | None = None, *, mode: Mode = "preference", seed: int | None = None, num_pairs: int | None = None
) -> Comparison:
    """A blind comparison of the answers that the evaluation recorded: `remaining`, `vote`, `results`, `export`; see `Comparison`."""
    from giong.evaluation.compare import Comparison

    return Comparison(project, arms, mode=mode, seed=seed, num_pairs=num_pairs)


def _quiet(event: Event) -> None:
    return None


def verdict(project: Project) -> str:
    """The verdict and its reason in one line. Raises StoryError before there is one."""
    result = project.step_result("eval")
    if result is None:
        raise StoryError("Nothing has been evaluated yet", place=str(project.root), remedy="Call giong.run(project) first.")
    return f"{result['decision']}: {result['reason']}"
