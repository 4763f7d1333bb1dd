"""Models that an objective listens to beside the one that it trains: where they lie, found before anything is loaded. Free of torch."""

from __future__ import annotations

from pathlib import Path

from giong.config import ObjectiveConfig
from giong.errors import ConfigError
from giong.workspace import Project, read_json


def named_reward_model(project: Project, objective: ObjectiveConfig) -> Path | None:
    """The folder of `objective.reward_model`: of that name among the project's, else a path. None where an objective asks for none.

    Raises ConfigError where no reward model lies there.
    """
    if not objective.is_online or objective.reward_model is None:
        return None
    own = project.root / "reward_models"
    for folder in (own / objective.reward_model, project.root / Path(objective.reward_model).expanduser()):
        if (folder / "model.json").is_file() and read_json(folder / "model.json").get("task") == "reward":
            return folder
    known = sorted(path.parent.name for path in own.glob("*/model.json"))
    raise ConfigError(
        f"{objective.reward_model!r} is neither a reward model of the project nor a folder with one", place="objective.reward_model",
        remedy=f"Reward models here: {', '.join(known) or 'none; train one with objective.name reward'}.",
    )  # fmt: skip


def other_models(project: Project, objective: ObjectiveConfig) -> list[Path]:
    """The files that say which models these are: part of a run's key."""
    folder = named_reward_model(project, objective)
    return [folder / "model.json"] if folder else []
