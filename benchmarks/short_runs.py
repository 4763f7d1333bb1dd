"""One short training through the engine, for studies that need many of them and keep only what they measure."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from giong.config import MethodConfig, ModelConfig, TrainConfig
from giong.contracts import Example
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.methods import METHODS, Trainable
from giong.models.devices import candidate_dtypes, resolve_device
from giong.models.load import LoadedModel, load_model
from giong.models.rows import example_rows
from giong.objectives import sft
from giong.workflow.probing import DTYPES, training_speed
from giong.workflow.story import ignore


def faster_dtype(config: ModelConfig) -> torch.dtype:
    """The number format in which this machine trains the model faster, as a project's probe finds it."""
    speeds = {
        name: training_speed(load_model(config, dtype=DTYPES[name])) for name in candidate_dtypes(resolve_device(config.device))
    }  # fmt: skip
    return DTYPES[max(speeds, key=lambda name: speeds[name])]


def short_run(loaded: LoadedModel, method: MethodConfig, settings: TrainConfig, examples: Sequence[Example]) -> Trainable:
    """Train `loaded` in place, with every setting resolved; the model is left in evaluation mode, the method still in it."""
    rows, _ = example_rows(loaded, examples)
    trainable = METHODS[method.name].apply(loaded.model, method, seed=settings.seed)
    config = LoopConfig(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(LoopConfig)})
    with tempfile.TemporaryDirectory() as checkpoints:
        train(
            trainable.model, trainable.parameters, rows, sft.loss, config, checkpoints=Path(checkpoints), emit=ignore,
            end_of_turn_ids=tuple(loaded.chat.end_token_ids),
        )  # fmt: skip
    trainable.model.eval()
    return trainable
