"""Section `sweep`: which settings are searched over, within what ends, and for how long.

A parameter is named as the setting is (`train.learning_rate`), and its ends and choices are checked against the very field
that they will be put into; whether they go with the project's other settings, `config/search_space.py` checks before the first trial.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from giong.config.base import Section
from giong.config.sampling import SamplingConfig
from giong.config.training import MethodConfig, TrainConfig
from giong.errors import ConfigError

SECTIONS: dict[str, type[Section]] = {"method": MethodConfig, "train": TrainConfig, "sampling": SamplingConfig}
_NO_RESULT = "no result depends on it"
_SPEED = "it changes memory and speed, and the result by rounding alone"
NOT_SWEPT = {
    "train.seed": "the best of several seeds is luck and not a setting",
    "train.max_tokens_per_pack": _SPEED,
    "train.activation_checkpointing": _SPEED,
    "train.activation_offload": _SPEED,
    "train.compile": _SPEED,
    "train.fsdp": _SPEED,
    "train.pseudo": "its rounds follow a training, and a trial is one training",
    "train.save_seconds": _NO_RESULT,
    "train.save_steps": _NO_RESULT,
    "train.keep_checkpoints": _NO_RESULT,
    "train.num_processes": _NO_RESULT,
    "method.target_modules": "its values are lists of layers",
    "method.start_from": "it names a model",
    "method.rank_pattern": "its values are tables of layers",
    "method.alpha_pattern": "its values are tables of layers",
}
"""Settings of the swept sections that are not searched over, with the reason."""
SPACE_KEYS = ("low", "high", "log", "step", "choices")


def sweepable() -> list[str]:
    """The dotted names that a sweep can take."""
    names = [f"{section}.{name}" for section, fields in SECTIONS.items() for name in fields.model_fields]
    return [name for name in names if name not in NOT_SWEPT]


class Parameter(Section):
    """What one setting may become: a range from `low` to `high`, or a list of `choices`."""

    name: str
    """Dotted name of the setting."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Draw on a logarithmic scale, as learning rates should be."""
    step: float | None = Field(default=None, gt=0)
    """Draw only `low`, `low + step`, and so on."""
    choices: list[Any] | None = None
    """The values to choose among."""

    @property
    def kind(self) -> Literal["choices", "int", "float"]:
        if self.choices is not None:
            return "choices"
        return "int" if int in _types(self.name) else "float"

    @property
    def outer_values(self) -> list[Any]:
        """The choices, or both ends of the range, as their section reads them."""
        return list(self.choices) if self.choices is not None else [_checked(self.name, end) for end in (self.low, self.high)]

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        unknown = next((key for key in values if key not in cls.model_fields), None)
        if unknown is not None:
            nearest = difflib.get_close_matches(str(unknown), SPACE_KEYS, n=1, cutoff=0.5)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"known: {', '.join(SPACE_KEYS)}"
            raise ValueError(f"unknown key `{unknown}`; {hint}")
        return values

    @model_validator(mode="after")
    def _check(self) -> Parameter:
        if self.name not in sweepable():
            raise ValueError(_unknown(self.name))
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("give either choices or low and high, not both")
            if len({str(choice) for choice in self.choices}) != len(self.choices) or len(self.choices) < 2:
                raise ValueError(f"choices must be two or more different values (given: {self.choices!r})")
            # The section's own types: YAML reads 1e-4 as text.
            object.__setattr__(self, "choices", [_checked(self.name, choice) for choice in self.choices])
            return self
        if self.low is None or self.high is None:
            raise ValueError("a range needs low and high (or give a list of choices)")
        if not _types(self.name) & {int, float}:
            raise ValueError(f"{self.name} is not a number: give a list of choices")
        for end in (self.low, self.high):
            _checked(self.name, end)
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be smaller than high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range cannot begin at {self.low:g}: low must be above 0")
        if self.log and self.step is not None:
            raise ValueError("a logarithmic range takes no step")
        if self.step is not None and abs((steps := (self.high - self.low) / self.step) - round(steps)) > 1e-8:
            raise ValueError(f"high ({self.high:g}) must be low ({self.low:g}) plus whole steps of {self.step:g}")
        if self.kind == "int" and self.step is not None and self.step != int(self.step):
            raise ValueError(f"the step of {self.name} must be a whole number (given: {self.step:g})")
        return self


class SweepConfig(Section):
    parameters: dict[str, Parameter] = {}
    """Settings to search over, by dotted name: `train.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}` or
    `method.lora_r: [8, 16, 32]`. Left out: learning rate and epochs around what giong would choose."""
    num_trials: int = Field(default=12, ge=2, le=1000)
    """Trials of each search, the settings as they are among them; those of `sampling` are a search of their own."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of settings."""
    pruning: bool = True
    """Stop a trial whose validation likelihood is worse than the median of the others at the same share of the run."""
    max_seconds: float | None = Field(default=None, gt=0)
    """No trial is begun after so much time spent on trials."""
    max_requests: int = Field(default=24, ge=2)
    """At most this many validation requests are answered per trial of sampling settings."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: _spelled_out(str(name), space) for name, space in value.items()}


def _spelled_out(name: str, space: Any) -> Any:
    """The long form of a space: each parameter knows its own name, so that an error is found on its own line."""
    if isinstance(space, Parameter):
        return space
    if isinstance(space, str):
        space = _from_text(space)
    if isinstance(space, (list, tuple)):
        space = {"choices": list(space)}
    return {**space, "name": name} if isinstance(space, Mapping) else {"name": name, "choices": [space]}


def _from_text(text: str) -> dict[str, Any]:
    """`1e-5..1e-3:log`, `1..4:step=1` or `8,16,32`."""
    if ".." not in text:
        return {"choices": [yaml.safe_load(part) for part in text.split(",")]}
    ends, *options = text.split(":")
    low, _, high = ends.partition("..")
    space: dict[str, Any] = {"low": low.strip(), "high": high.strip()}
    for option in options:
        key, _, value = option.strip().partition("=")
        space[key] = value or True
    return space


def parameters_from_text(assignments: Iterable[str]) -> dict[str, str]:
    """`NAME=SPACE` of the command line by name. Raises ConfigError for one without `=`; spaces are checked by `SweepConfig`."""
    found: dict[str, str] = {}
    for assignment in assignments:
        name, equals, space = assignment.partition("=")
        if not equals or not space:
            raise ConfigError(
                f"{assignment!r} does not say what to try", place="--set",
                remedy="Write NAME=LOW..HIGH (add :log for learning rates) or NAME=A,B,C.",
            )  # fmt: skip
        found[name.strip()] = space.strip()
    return found


def _unknown(name: str) -> str:
    if name in NOT_SWEPT:
        return f"`{name}` cannot be swept: {NOT_SWEPT[name]}"
    names = sweepable()
    last = name.rpartition(".")[2]
    # `learning_rate` without its section is a likelier slip than a misspelling.
    nearest = [known for known in names if known.rpartition(".")[2] == last] or difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are {', '.join(names)}"
    return f"there is no setting `{name}` to sweep; {hint}"


@functools.cache
def _field(name: str) -> TypeAdapter[Any]:
    """What reads one setting alone: its section would also ask for the others that it needs."""
    section, _, key = name.partition(".")
    info = SECTIONS[section].model_fields[key]
    return TypeAdapter(Annotated[info.annotation, info])


def _checked(name: str, value: Any) -> Any:
    """The value as its field reads it. Raises ValueError with the field's reason."""
    try:
        return _field(name).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        raise ValueError(f"{shown} cannot be a value of {name}: {reason[0].lower()}{reason[1:]}") from None


def _types(name: str) -> set[Any]:
    section, _, key = name.partition(".")
    annotation = SECTIONS[section].model_fields[key].annotation
    return {annotation} if get_origin(annotation) is Literal else {annotation, *get_args(annotation)}
