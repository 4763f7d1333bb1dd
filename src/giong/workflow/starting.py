"""Training that goes on from an adapter: where `method.start_from` lies, and the settings that its adapter brings. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from giong.config import MethodConfig
from giong.errors import ConfigError
from giong.sizing.shapes import LOW_RANK
from giong.workspace import Project, read_json

FORMATS = {"lora": "adapter", "qlora": "nf4_adapter"}
"""The format in which each method's own models are saved."""

PLACE = "method.start_from"


def started(project: Project, method: MethodConfig) -> MethodConfig:
    """The settings with `start_from` as a path, and rank, scale and layers as the adapter there has them.

    Raises ConfigError where there is no adapter, where it is of another kind, and where giong.yaml asks for another rank or scale.
    """
    if method.start_from is None:
        return method
    if method.name not in LOW_RANK:
        raise ConfigError(f"`{method.name}` cannot go on from an adapter", place=PLACE, remedy="Set method.name to lora, or leave it out.")
    if method.init_lora_weights != "default":
        raise ConfigError("A run that goes on from an adapter has its start", place=PLACE, remedy="Leave method.init_lora_weights out.")
    folder = _folder(project, method)
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA" or isinstance(settings["target_modules"], str):
        raise ConfigError(
            "This adapter is not one that `lora` makes", place=str(folder), remedy="Start from a LoRA, its layers listed by name."
        )
    theirs: dict[str, Any] = {
        "lora_r": settings["r"], "lora_alpha": float(settings["lora_alpha"]), "target_modules": sorted(settings["target_modules"]),
        **{name: settings.get(name) or default for name, default in (("use_rslora", False), ("use_dora", False), ("bias", "none"))},
        **{name: dict(settings.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")},
    }  # fmt: skip
    for name, value in theirs.items():
        ours = getattr(method, name)
        if ours not in (value, MethodConfig.model_fields[name].default):
            raise ConfigError(
                f"method.{name} is {ours!r}, and the adapter to start from has {value!r}", place=PLACE, remedy=f"Leave method.{name} out."
            )
    return method.model_copy(update={**theirs, "start_from": str(folder)})


def _folder(project: Project, method: MethodConfig) -> Path:
    given, kind = str(method.start_from), FORMATS[method.name]
    models = {path.name: path for path in project.list_models()}
    folder = models[given] / kind if given in models else (project.root / Path(given).expanduser())
    if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
        return folder
    what = (
        f"The model {given!r} has no {kind}"
        if given in models
        else f"{given!r} is neither a model of the project nor a folder with an adapter"
    )
    raise ConfigError(what, place=PLACE, remedy=f"Models here: {', '.join(models) or 'none'}.")
