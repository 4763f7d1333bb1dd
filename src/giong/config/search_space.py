"""What a sweep would try, held against the whole of giong.yaml before anything is trained.

`config/sweep.py` checks a parameter against its own field; which settings go together, and which are read at all, the other
settings decide. Each is checked at its choices or at both ends of its range, two parameters at a time: the rules of the schema
join two settings, and all combinations of many parameters would be too many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from giong.config import Parameter, ProjectConfig, with_settings
from giong.config.training import OF_METHOD
from giong.errors import ConfigError

NEEDS: dict[str, tuple[str, Callable[[ProjectConfig], bool]]] = {
    "method.sparse_rows": ("method.sparse_score fisher or gradient", lambda config: config.method.sparse_score in ("fisher", "gradient")),
    "train.eval_steps": (
        "train.load_best_model_at_end or early stopping",
        lambda config: (
            config.train.load_best_model_at_end
            or (config.train.early_stopping_patience, config.train.early_stopping_memorisation) != (None, None)
        ),
    ),
    **{
        name: ("a sampling.temperature above 0", lambda config: bool(config.sampling.temperature))
        for name in ("sampling.top_p", "sampling.top_k")
    },
}
"""Settings that are read with others alone, beside those of `OF_METHOD`: in words, and whether a project has it so."""


def check_space(config: ProjectConfig, parameters: Mapping[str, Parameter], *checks: Callable[[ProjectConfig], None]) -> None:
    """Check what trials over `parameters` would be made of; `checks` are further ones, which raise ConfigError.

    Raises ConfigError for values that the other settings forbid, and for a parameter that no trial would read.
    """
    # A search says nothing about a trial, and would be checked again with each.
    bare = with_settings(config, {"sweep": {}})
    tried = []
    for named, settings in _corners(parameters):
        try:
            trial = with_settings(bare, settings)
            for check in checks:
                check(trial)
        except ConfigError as error:
            raise ConfigError(
                f"The sweep would try {describe_settings(named)}: {error.message}", place="sweep.parameters", remedy=error.remedy
            ) from None  # fmt: skip
        tried.append(trial)
    for name in parameters:
        missing = [_missing(name, trial) for trial in tried]
        if all(missing):
            raise ConfigError(
                f"A sweep over {name} would change nothing: it is read with {missing[0]} alone", place=f"sweep.parameters.{name}",
                remedy="Set that, or leave the parameter out.",
            )  # fmt: skip


def _corners(parameters: Mapping[str, Parameter]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(the values that vary, the settings of all parameters): every pair of outer values, the others at their first."""
    values = {name: parameter.outer_values for name, parameter in parameters.items()}
    first = {name: outer[0] for name, outer in values.items()}
    for names in itertools.combinations(values, min(2, len(values))):
        for chosen in itertools.product(*(values[name] for name in names)):
            named = dict(zip(names, chosen))
            yield named, first | named


def _missing(name: str, config: ProjectConfig) -> str:
    """What a project lacks for a setting to be read, in words; empty where it is read."""
    section, _, key = name.partition(".")
    readers = [method for method, keys in OF_METHOD.items() if section == "method" and key in keys]
    if readers and config.method.name not in readers:
        return f"method.name {' or '.join(readers)}"
    words, is_met = NEEDS.get(name, ("", lambda config: True))
    return "" if is_met(config) else words


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items())
