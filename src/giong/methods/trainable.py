"""What a method returns: the model that computes, the parameters that move, how they are saved and merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trainable:
    """`model` is the plain causal model (adapter layers in place), which is what the engine runs.

    `save(folder)` writes what was trained, in PEFT's format where PEFT has the method; `merge()` returns a plain model
    with the update folded in; `detach()` takes the method out of the model again and says whether the base is as it was
    (when not, it has to be loaded anew). `format` is "adapter" or "weights".
    """

    model: PreTrainedModel
    parameters: dict[str, torch.nn.Parameter]
    format: str
    save: Callable[[Path], None]
    merge: Callable[[], PreTrainedModel]
    detach: Callable[[], bool]

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())
