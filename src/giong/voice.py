"""A tuned model in this process: load it, write with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from giong.config import load as load_config
from giong.contracts import Message, Predictor, Request, Sampling
from giong.errors import StoryError
from giong.generation.local import LocalModel
from giong.models.load import load_model
from giong.models.trained import load_trained
from giong.workspace import Project, read_json


class Voice:
    """A tuned model in this process: `write` asks it for one text."""

    def __init__(self, predictor: Predictor, sampling: Sampling) -> None:
        self.predictor, self.sampling = predictor, sampling

    def write(self, request: str, **sampling: Any) -> str:
        """The model's answer to one request; keywords override its saved sampling (`temperature=0.7`)."""
        chosen = dataclasses.replace(self.sampling, **sampling)
        return self.predictor.predict([Request("write", (Message("user", request),), chosen)])[0].text


def load(project: Project, name: str | None = None) -> Voice:
    """Load a tuned model of the project (the newest by default) into this process. Imports torch."""

    config = load_config(project.config_path)
    folder = project.model_path(name or config.name)
    if not (folder / "model.json").is_file():
        raise StoryError(f"There is no tuned model {folder.name!r}", place=str(folder), remedy="Call giong.run(project) first.")
    record = read_json(folder / "model.json")
    sampling, dtype = Sampling(**record["sampling"]), getattr(torch, record["dtype"])
    if record["format"] == "adapter":
        local = LocalModel(load_model(config.model, dtype=dtype))
        local.add_adapter(record["name"], folder / "adapter")
        return Voice(local.predictor(record["name"], record["name"], sampling), sampling)
    local = LocalModel(load_trained(config.model, folder / record["format"], dtype=dtype))
    return Voice(local.predictor(record["name"], None, sampling), sampling)
