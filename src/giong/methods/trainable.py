"""What a method returns: the model that computes, the parameters that move, how they are saved and merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from giong.models.parts import parameters_of, task_head
from giong.models.trained import save_partial


@dataclass(frozen=True)
class Trainable:
    """`model` is the plain causal model (adapter layers in place), which is what the engine runs.

    `save(folder)` writes what was trained, in PEFT's format where PEFT has the method; `merge()` returns a plain model
    with the update folded in; `detach()` takes the method out of the model again and says whether the base is as it was
    (when not, it has to be loaded anew). `format` is the method's `FORMAT` (see `giong.methods`).
    `learning_rate_factors` multiply the learning rate of single parameters.
    """

    model: PreTrainedModel
    parameters: dict[str, torch.nn.Parameter]
    format: str
    save: Callable[[Path], None]
    merge: Callable[[], PreTrainedModel]
    detach: Callable[[], bool]
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def trainable_tensors(
    model: PreTrainedModel, moving: Iterable[torch.nn.Parameter], method: str, base_name: str, **settings: Any
) -> Trainable:
    """A method that moves some of the model's own tensors and nothing else (but the head of a classifier, which always moves); only
    these are saved, with the `settings` that loading needs.

    What they were is kept in the host's memory, so that `detach` puts the base back bit by bit.
    """
    wanted = {id(parameter) for parameter in (*moving, *parameters_of(list(task_head(model).values())))}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def save(folder: Path) -> None:
        save_partial(folder, parameters, method=method, base_name=base_name, **settings)

    @torch.no_grad()
    def detach() -> bool:
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
            parameter.grad = None
        model.requires_grad_(False)
        return True

    return Trainable(model, parameters, "partial", save, lambda: model, detach)
