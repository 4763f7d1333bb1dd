"""The settings of a project: one schema, read from giong.yaml, the command line or Python.

`load` reads a file, `parse` a mapping; both refuse unknown keys and name the nearest one, with the line in the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from giong.config.adapters import AdaptersConfig
from giong.config.advice import AdviceConfig
from giong.config.base import Section
from giong.config.baselines import ArmModelConfig, BaselinesConfig
from giong.config.data import ConsentConfig, DataConfig
from giong.config.evaluation import BudgetConfig, EvaluationConfig, SizingConfig
from giong.config.export import ExportConfig, ServeConfig
from giong.config.judge import JudgeConfig
from giong.config.model import BUNDLED, ModelConfig
from giong.config.remote import RemoteModelConfig, RemoteTrainingConfig
from giong.config.sampling import SamplingConfig
from giong.config.sweep import Parameter, SweepConfig
from giong.config.synthesis import SynthesisConfig, SynthesisKind
from giong.config.tasks import ClassifyConfig, EmbedConfig, MlmConfig
from giong.config.training import NOT_MERGED, ONLINE, WRITERS_ONLY, MethodConfig, ObjectiveConfig, PseudoConfig, TrainConfig
from giong.errors import ConfigError

__all__ = [
    "BUNDLED", "NOT_MERGED", "AdaptersConfig", "AdviceConfig", "ArmModelConfig", "BaselinesConfig", "BudgetConfig", "ClassifyConfig", "ConsentConfig", "DataConfig", "EmbedConfig", "EvaluationConfig",
    "ExportConfig", "JudgeConfig", "MethodConfig", "MlmConfig", "ModelConfig", "ObjectiveConfig", "Parameter", "ProjectConfig", "PseudoConfig", "RemoteModelConfig",
    "RemoteTrainingConfig", "SamplingConfig", "Section", "ServeConfig", "SizingConfig", "SweepConfig", "SynthesisConfig", "SynthesisKind", "TrainConfig", "load", "parse", "with_settings",
]  # fmt: skip


MAX_DEPTH = 20
"""Deeper than any setting lies: only an alias inside its own anchor goes there."""


class ProjectConfig(Section):
    """giong.yaml: one section per concern."""

    name: str = "myvoice"
    """Name of the project and of the tuned model."""
    task: Literal["generate", "classify", "embed", "mlm"] = "generate"
    """`generate` tunes a model to write like the author; `classify` tunes one to label texts (section `classify`), `embed` one that
    turns texts into vectors (section `embed`), `mlm` an encoder on texts without labels (section `mlm`)."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    classify: ClassifyConfig = ClassifyConfig()
    embed: EmbedConfig = EmbedConfig()
    mlm: MlmConfig = MlmConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    sizing: SizingConfig = SizingConfig()
    method: MethodConfig = MethodConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    sweep: SweepConfig = SweepConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    advice: AdviceConfig = AdviceConfig()
    budget: BudgetConfig = BudgetConfig()
    export: ExportConfig = ExportConfig()
    serve: ServeConfig = ServeConfig()
    adapters: AdaptersConfig = AdaptersConfig()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        # A section whose every line is commented out is a section of defaults.
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"name_or_path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> ProjectConfig:
        if self.train.optimizer == "muon" and self.method.name != "full":
            raise ValueError("train.optimizer muon needs method.name full")
        of_writing = {
            "train.num_processes": self.train.num_processes > 1, "train.replay_share": self.train.replay_share > 0,
            "train.kl_weight": self.train.kl_weight > 0, "method.init_lora_weights": self.method.init_lora_weights == "pissa",
            "train.early_stopping_memorisation": self.train.early_stopping_memorisation is not None, "train.pseudo": self.train.pseudo is not None,
            "train.surprise_weight": self.train.surprise_weight > 0,
        }  # fmt: skip
        if self.task != "generate" and (unfit := [name for name, is_set in of_writing.items() if is_set]):
            raise ValueError(f"{unfit[0]} is made for task generate alone: leave it out with task {self.task}")
        if self.task != "generate" and self.objective.name != "sft":
            raise ValueError(f"task {self.task} has an objective of its own: leave objective.name {self.objective.name} out")
        if self.method.name in WRITERS_ONLY and (self.task != "generate" or self.objective.name == "reward"):
            what = "objective.name reward" if self.task == "generate" else f"task {self.task}"
            raise ValueError(f"method.name {self.method.name} is made for models that write: choose another with {what}")
        if self.train.surprise_weight and self.objective.name != "sft":
            raise ValueError(
                f"train.surprise_weight weighs answers that objective.name sft learns: leave it out with {self.objective.name}"
            )
        self._check_pilots()
        if self.objective.learns_from != "examples":
            self._check_preferences()
        if self.objective.is_online:
            self._refuse({**self._of_answers(), "objective.loss_on all": self.objective.loss_on == "all"}, "answers that the model draws")
        if self.objective.name in ONLINE:
            # Both go by the likelihood of the author's answers, which need not rise with the reward.
            by_likelihood = {
                "train.load_best_model_at_end": self.train.load_best_model_at_end,
                "train.early_stopping_patience": self.train.early_stopping_patience,
            }
            self._refuse(by_likelihood, "rewards")
        if self.objective.name in ("distill", "ppo") and self.train.num_processes > 1:
            raise ValueError(f"objective.name {self.objective.name} trains in one process: leave train.num_processes out")
        if self.method.name in NOT_MERGED and self.export.formats:
            raise ValueError(
                f"export.formats {self.export.formats!r} cannot be made of method.name {self.method.name}: its adapters cannot be merged, "
                "and giong alone loads them"
            )
        return self

    def _check_pilots(self) -> None:
        local, remote = self.sizing.pilot_model, self.sizing.pilot_remote
        if local and remote:
            raise ValueError("sizing.pilot_model and sizing.pilot_remote both say where the pilots are trained: leave one out")
        if local and local == self.model.name_or_path:
            raise ValueError(f"sizing.pilot_model {local!r} cannot be the model itself: leave it out")
        if (local or remote) and self.method.start_from:
            name = "pilot_model" if local else "pilot_remote"
            raise ValueError(f"sizing.{name} cannot go on from method.start_from, an adapter of another model: leave it out")
        if remote and (self.objective.name != "sft" or self.objective.loss_on == "all"):
            given = f"name {self.objective.name}" if self.objective.name != "sft" else "loss_on all"
            raise ValueError(f"sizing.pilot_remote learns answers, and objective.{given} asks for something else: leave it out")

    def _check_preferences(self) -> None:
        name, what = self.objective.name, self.objective.learns_from
        if not self.data.preferences:
            raise ValueError(f"objective.name {name} learns from {what}: name their file in data.preferences")
        of_writing = self._of_answers()
        if name in ("kto", "reward"):
            of_writing |= {
                "train.num_processes": self.train.num_processes > 1, "train.early_stopping_memorisation": self.train.early_stopping_memorisation,
                "train.kl_weight": self.train.kl_weight,
                "method.init_lora_weights": self.method.init_lora_weights == "pissa",
            }  # fmt: skip
        if name == "reward":
            of_writing |= {"method.start_from": self.method.start_from}
        self._refuse(of_writing, what)

    def _of_answers(self) -> dict[str, Any]:
        """Settings that add rows to the author's answers."""
        return {
            "train.replay_share": self.train.replay_share, "train.pseudo": self.train.pseudo, "evaluation.num_canaries": self.evaluation.num_canaries,
        }  # fmt: skip

    def _refuse(self, settings: Mapping[str, Any], what: str) -> None:
        if unfit := [setting for setting, value in settings.items() if value]:
            raise ValueError(
                f"{unfit[0]} is for learning the author's answers: leave it out with objective.name {self.objective.name}, which learns from {what}"
            )


def load(path: Path) -> ProjectConfig:
    """Read giong.yaml. Raises ConfigError naming the file, the line and the nearest known key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("There is no giong.yaml", place=str(path), remedy="Make a project with `giong init NAME --from DIR`.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"giong.yaml cannot be read: {error}", place=str(path), remedy="It must be UTF-8 text.") from None
    try:
        lines = _key_lines(text, str(path))
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"giong.yaml is not valid YAML: {getattr(error, 'problem', error)}", place=place, remedy="Mend that line."
        ) from None
    return parse(values or {}, place=str(path), lines=lines)


def parse(values: Mapping[str, Any], *, place: str = "", lines: Mapping[tuple[str, ...], int] | None = None) -> ProjectConfig:
    """Check a mapping against the schema. `lines` maps key paths to line numbers, for the message."""
    if not isinstance(values, Mapping):
        raise ConfigError("The settings must be a mapping of sections", place=place, remedy="Start with `model:` or `data:`.")
    try:
        return ProjectConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise _explain(first, place, lines or {}) from None


def with_settings(config: ProjectConfig, settings: Mapping[str, Any]) -> ProjectConfig:
    """The same project with dotted settings replaced: `{"train.learning_rate": 1e-4}`."""
    values = config.model_dump()
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            nested = section.get(parent)
            if not isinstance(nested, dict):
                nested = section[parent] = {}
            section = nested
        section[last] = value
    return parse(values)


def _explain(problem: Mapping[str, Any], place: str, lines: Mapping[tuple[str, ...], int]) -> ConfigError:
    location = tuple(str(part) for part in problem["loc"])
    dotted = ".".join(location)
    line = next((lines[location[:depth]] for depth in range(len(location), 0, -1) if location[:depth] in lines), None)
    where = f"{place}:{line}" if place and line else place or dotted
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = _sections_with(location[-1])
        if nearest:
            remedy = f"Did you mean `{'.'.join((*location[:-1], nearest[0]))}`?"
        elif elsewhere:
            remedy = f"Did you mean `{elsewhere[0]}`?"
        else:
            remedy = f"Known here: {', '.join(known)}."
        return ConfigError(f"Unknown setting `{dotted}`", place=where, remedy=remedy)
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("missing", "value_error") else f" (given: {problem['input']!r})"
    # What settings of several sections forbid each other names them itself.
    named = f"Setting `{dotted}`: " if dotted else ""
    return ConfigError(f"{named}{message}{given}", place=where, remedy="Correct it or leave it out for the default.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _known_keys(path: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] = ProjectConfig
    for part in path:
        if part.isdigit():
            continue
        nested = _section_type(section.model_fields[part].annotation) if part in section.model_fields else None
        if nested is None:
            return []
        section = nested
    return list(section.model_fields)


def _sections_with(key: str) -> list[str]:
    return [
        f"{name}.{key}"
        for name, info in ProjectConfig.model_fields.items()
        if (section := _section_type(info.annotation)) and key in section.model_fields
    ]


def _key_lines(text: str, place: str) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of every key path in a YAML text. Raises ConfigError for a key that stands twice or holds itself."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"`{path[0]}` is nested too deeply", place=f"{place}:{lines[path]}", remedy="Write it out without aliases.")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                child = (*path, str(key.value))
                line = key.start_mark.line + 1
                if child in lines:
                    # YAML would silently take the last one.
                    raise ConfigError(
                        f"`{'.'.join(child)}` stands twice",
                        place=f"{place}:{line}",
                        remedy=f"Keep one; the first is in line {lines[child]}.",
                    )
                lines[child] = line
                walk(value, child)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*path, str(index))] = value.start_mark.line + 1
                walk(value, (*path, str(index)))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines
