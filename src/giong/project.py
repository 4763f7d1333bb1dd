"""The Python interface in a few names: make a project, run its story, read the verdict, write with the voice.

The work happens in a worker process, as on the command line, so that importing giong never imports torch and a crash of
the one is not the end of the other. `load` is the exception: it answers in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from giong.config import ProjectConfig, parse
from giong.contracts import RUN_STEPS, Emit, Event, Message, Request, Sampling
from giong.errors import ConfigError, StoryError
from giong.workspace import Project, atomic_write, read_json, resource_errors, safe_name

if TYPE_CHECKING:
    from giong.contracts import Predictor


def init(
    path: str | Path, *, sources: Sequence[str | Path] = (), model: str | None = None, settings: Mapping[str, Any] | None = None
) -> Project:
    """Make a project folder with its giong.yaml. `settings` are sections as in giong.yaml.

    Raises ConfigError when the folder already is a project, and for unknown settings.
    """
    root = Path(path).expanduser().resolve()
    project = Project(root)
    if project.config_path.exists():
        raise ConfigError("This folder already is a project", place=str(project.config_path), remedy="Choose another name, or edit its giong.yaml.")
    for source in sources:
        if not Path(source).expanduser().exists():
            raise ConfigError("There is no such folder or file", place=str(source), remedy="Correct --from.")
    values: dict[str, Any] = {"name": safe_name(root.name)}
    if model:
        values["model"] = _absolute_model(model)
    values["data"] = {"paths": [str(Path(source).expanduser().resolve()) for source in sources]}
    for section, content in (settings or {}).items():
        values[section] = {**values.get(section, {}), **content} if isinstance(content, Mapping) and isinstance(values.get(section), dict) else content
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


class Voice:
    """A tuned model in this process: `write` asks it for one text."""

    def __init__(self, predictor: Predictor, sampling: Sampling) -> None:
        self.predictor, self.sampling = predictor, sampling

    def write(self, request: str, **sampling: Any) -> str:
        """The model's answer to one request; keywords override its saved sampling (`temperature=0.7`)."""
        import dataclasses

        chosen = dataclasses.replace(self.sampling, **sampling)
        return self.predictor.predict([Request("write", (Message("user", request),), chosen)])[0].text


def load(project: Project, name: str | None = None) -> Voice:
    """Load a tuned model of the project (the newest by default) into this process. Imports torch."""
    import torch

    from giong.generation.local import LocalModel
    from giong.models.load import load_model

    config = _config(project)
    folder = project.model_path(name or config.name)
    if not (folder / "model.json").is_file():
        raise StoryError(f"There is no tuned model {folder.name!r}", place=str(folder), remedy="Call giong.run(project) first.")
    record = read_json(folder / "model.json")
    sampling, dtype = Sampling(**record["sampling"]), getattr(torch, record["dtype"])
    if record["format"] == "adapter":
        local = LocalModel(load_model(config.model, dtype=dtype))
        local.add_adapter(record["name"], folder / "adapter")
        return Voice(local.predictor(record["name"], record["name"], sampling), sampling)
    local = LocalModel(load_model(config.model.model_copy(update={"name_or_path": str(folder / "weights")}), dtype=dtype))
    return Voice(local.predictor(record["name"], None, sampling), sampling)


def _config(project: Project) -> ProjectConfig:
    from giong.config import load as load_config

    return load_config(project.config_path)
