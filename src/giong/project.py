"""The Python interface in a few names: make a project, run its story, read the verdict.

The work happens in a worker process, as on the command line, so that importing giong never imports torch and a crash of
the one is not the end of the other. (`giong.load` is the exception: it answers in this process; see `giong.voice`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from giong.config import MethodConfig, ObjectiveConfig, load, parse, with_settings
from giong.config.editing import with_written
from giong.config.search_space import check_space
from giong.config.training import LEARNS_FROM
from giong.contracts import TASK_STEPS, Emit, Event
from giong.data.preferences import has_pairs
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
    max_requests: int | None = None,
    apply: bool = False,
    emit: Emit | None = None,
    force: bool = False,
    num_processes: int | None = None,
) -> dict[str, Any]:
    """Search over settings on the validation documents; what is None is as in giong.yaml. `apply` writes the winner there.

    `parameters` as in section `sweep`: `{"train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "method.lora_r": [8, 16]}`.
    `max_seconds` of trials begin no further one; `max_requests` are answered per trial of sampling settings; `num_processes` share each
    training step.
    Returns the result: `settings` of the winner by dotted name, `training` and `sampling` with their trials, value, interval and
    how optimistic it is. Raises ConfigError for a setting or value that cannot be swept, and where Optuna is not installed.
    """
    from giong.jobs.supervisor import run_story

    given = {
        "parameters": parameters, "num_trials": num_trials, "seed": seed, "pruning": pruning, "max_seconds": max_seconds,
        "max_requests": max_requests,
    }  # fmt: skip
    config = load(project.config_path)
    section = {**config.sweep.model_dump(), **{name: value for name, value in given.items() if value is not None}}
    # Checked here, where a mistake costs no start of a worker.
    config = with_settings(config, {"sweep": section})
    check_space(config, config.sweep.parameters)
    settings = {"sweep": config.sweep.model_dump()}
    run_story(project.root, ["sweep"], emit or _quiet, force=force, settings=settings, num_processes=num_processes)
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
    own, names = load(project.config_path).method.name, get_args(MethodConfig.model_fields["name"].annotation)
    reset = {"train.learning_rate": None}
    return _compare(project, "method", names, methods or (), names, own, reset, emit or _quiet, force=force, num_processes=num_processes)


def compare_objectives(
    project: Project,
    objectives: Sequence[str] | None = None,
    *,
    emit: Emit | None = None,
    force: bool = False,
    num_processes: int | None = None,
) -> dict[str, Any]:
    """The same base and as many tokens through several objectives, with the method of giong.yaml; returns a row per objective.

    `objectives` are names of `objective.name`, None for all that fit the project's data. The budget is what `sft` reads in
    `train.num_epochs` passes (by default as many as it would make). Each gets its own default learning rate, beta and number of updates, but
    for the objective of giong.yaml, which keeps its settings. Raises ConfigError for an unknown name, and for `reward`, whose model
    writes nothing.
    """
    config = load(project.config_path)
    given = config.data.preferences
    learnable = {
        "examples",
        *(["ratings"] if given else []),
        *(["pairs"] if given and has_pairs(project.root / Path(given).expanduser()) else []),
    }
    names = [name for name in get_args(ObjectiveConfig.model_fields["name"].annotation) if name != "reward"]
    fitting = [name for name in names if LEARNS_FROM.get(name, "examples") in learnable and (name != "distill" or config.objective.teacher)]
    reset = {"train.learning_rate": None, "objective.beta": None, "objective.num_updates": None}
    return _compare(
        project, "objective", names, objectives or (), fitting, config.objective.name, reset, emit or _quiet, force=force,
        num_processes=num_processes,
    )  # fmt: skip


def _compare(
    project: Project, kind: str, names: Sequence[str], wanted: Sequence[str], default: Sequence[str], own: str, reset: Mapping[str, Any],
    emit: Emit, *, force: bool, num_processes: int | None,
) -> dict[str, Any]:  # fmt: skip
    """A trial of each that is wanted, else of all in `default` that can be tried; then all are measured. Others than `own` get `reset`."""
    from giong.jobs.supervisor import run_story

    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"There is no {kind} {unknown[0]!r} to compare", remedy=f"{kind.capitalize()}s: {', '.join(names)}.")
    run_story(project.root, ["baseline"], emit, force=force)
    for name in wanted or default:
        settings = {} if name == own else {**reset, f"{kind}.name": name}
        try:
            run_story(project.root, [f"{kind}-trial"], emit, force=force, settings=settings, num_processes=num_processes)
        except (ConfigError, ModelError) as error:
            if wanted:
                raise
            emit(Event("notice", f"compare-{kind}s", f"{name} is left out: {error}"))
    run_story(project.root, [f"compare-{kind}s"], emit, force=force)
    result = project.step_result(f"compare-{kind}s")
    assert result is not None
    return result


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
