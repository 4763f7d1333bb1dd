"""One short training through the engine, for studies that need many of them and keep only what they measure."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from giong.config import MethodConfig, TrainConfig
from giong.contracts import Example
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.methods import METHODS, Trainable
from giong.models.load import LoadedModel
from giong.models.rows import example_rows
from giong.objectives import sft
from giong.workflow.story import ignore


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
