"""Models beside the one that is trained, which an objective listens to or the evaluation measures with: where they lie, found before
anything is loaded. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from giong.config import EvaluationConfig, ObjectiveConfig
from giong.config.training import ONLINE
from giong.errors import ConfigError
from giong.models.folder import check_folder, entailment_label, resolve
from giong.workspace import Project, read_json


def named_reward_model(project: Project, objective: ObjectiveConfig) -> Path | None:
    """The folder of `objective.reward_model`: of that name among the project's, else a path. None where an objective asks for none.

    Raises ConfigError where no reward model lies there.
    """
    if objective.name not in ONLINE or objective.reward_model is None:
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


def named_teacher(project: Project, objective: ObjectiveConfig) -> Path | None:
    """The folder of `objective.teacher`; None where an objective asks for none. Raises ModelError where it cannot be loaded safely."""
    if objective.name != "distill":
        return None
    folder = project.root / Path(resolve(objective.teacher or "")).expanduser()
    check_folder(folder, "objective.teacher")
    return folder


def check_vocabulary(own: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """Raise ConfigError where a teacher does not know the same tokens by the same numbers."""
    if different := [token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)]:
        raise ConfigError(
            f"The teacher has another tokenizer: {len(different)} tokens differ, {min(different)!r} among them", place="objective.teacher",
            remedy="Take a teacher of the model's own family.",
        )  # fmt: skip


def check_other_models(project: Project, objective: ObjectiveConfig, student: Path | None) -> None:
    """Raise what the two above raise, and what `check_vocabulary` does where `student`, the model's folder, is known."""
    named_reward_model(project, objective)
    teacher = named_teacher(project, objective)
    files = [folder / "tokenizer.json" for folder in (student, teacher) if folder]
    if len(files) == 2 and all(file.is_file() for file in files):
        check_vocabulary(*(Tokenizer.from_file(str(file)).get_vocab() for file in files))


MEASURING = ("bertscore_model", "nli_model", "style_model")


def measuring_models(project: Project, evaluation: EvaluationConfig) -> dict[str, Path]:
    """The folders that section `evaluation` names, by setting. Raises ConfigError and ModelError for what cannot be measured with."""
    found = {}
    for name in MEASURING:
        if (given := getattr(evaluation, name)) is None:
            continue
        folder, place = project.root / Path(given).expanduser(), f"evaluation.{name}"
        if not folder.is_dir():
            raise ConfigError(f"There is no model folder {given!r}", place=place, remedy="Put the model there, or leave the setting out.")
        check_folder(folder, place)
        labels = read_json(folder / "config.json").get("id2label") or {}
        if name == "nli_model" and entailment_label(labels) is None:
            raise ConfigError(
                f"The model {given!r} was not made for natural language inference: its labels are {', '.join(labels.values()) or 'not named'}",
                place=place, remedy="Name one with a label `entailment`.",
            )  # fmt: skip
        found[name] = folder
    return found
