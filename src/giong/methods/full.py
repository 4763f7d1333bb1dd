"""Full fine-tuning: every weight moves."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.methods.trainable import Trainable
from giong.models.saving import system_errors

FORMAT = "weights"


def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Make every parameter of `model` trainable; tied weights count once. `seed` and `base_name` are not needed here."""
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())

    def save(folder: Path) -> None:
        with system_errors():
            model.save_pretrained(folder, safe_serialization=True)

    return Trainable(model, parameters, FORMAT, save, lambda: model, lambda: False)
